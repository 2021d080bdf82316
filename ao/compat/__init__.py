"""Other libraries' import paths over the names of ao."""
