"""The main job of fastseg on real images: find and read handwritten digits in photographs."""
