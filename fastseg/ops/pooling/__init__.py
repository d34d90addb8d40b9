"""Max pooling with indices, unpooling, and the compact indices that connect them."""
