"""History in fewer bytes: encoding it once, and decoding it for every pass that reads it."""
