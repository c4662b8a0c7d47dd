"""The shells around the core: Serve application, HTTP, command line, demo."""
