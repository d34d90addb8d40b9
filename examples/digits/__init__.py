"""Semantic segmentation of real images: find and classify handwritten digits in photographs."""
