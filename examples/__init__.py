"""Programs that use fastseg on real images."""


def heading(text):
    print(f"\n=== {text} ===\n", flush=True)
