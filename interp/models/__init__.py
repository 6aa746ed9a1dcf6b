"""Models for interp: `load` reads one from a folder, a file or the Hugging Face hub; `demo` builds the demo model."""
