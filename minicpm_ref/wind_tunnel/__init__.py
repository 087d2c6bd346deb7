"""Model Wind Tunnel 2.0: predict the large run from small ones."""
