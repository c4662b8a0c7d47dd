"""The embedded default: a world to look at, a small model that knows it, and a guided demo of both."""
