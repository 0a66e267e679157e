"""What an operator writes and a request may change, validated, with errors a person can act on."""
