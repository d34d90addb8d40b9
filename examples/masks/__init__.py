"""Instance masks on real images: overlapping handwritten digits as packed masks, with pasting, NMS and AP."""
