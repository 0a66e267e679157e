"""What a person runs to look: doctor, explain, vLLM on Triton's interpreter; and what pictures and files share."""
