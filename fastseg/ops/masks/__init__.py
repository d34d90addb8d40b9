"""Binary masks at one bit per pixel: packing, set arithmetic, boxes, IoU, non-maximum suppression, run lengths."""
