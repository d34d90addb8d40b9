"""Max pooling with indices, unpooling, and the compact indices that go from one to the other."""
