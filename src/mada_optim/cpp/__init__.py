"""C++ sources made into libraries on the user's machine, and kept."""
