"""A server of our own, a client of any, and videos made with them."""
