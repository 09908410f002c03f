"""C++ that is compiled on the user's machine, where there is a compiler."""
