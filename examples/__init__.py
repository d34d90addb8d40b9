"""Programs that show fastseg at work on real images."""


def heading(text):
    print(f"\n=== {text} ===\n", flush=True)
