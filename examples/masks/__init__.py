"""Instance masks on real images: overlapping handwritten digits as packed masks through pasting, NMS and AP."""
