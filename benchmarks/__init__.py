"""Scripts that measure the server; each prints a table and the machine it was taken on."""
