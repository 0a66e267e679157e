"""Worker side: what attention reads. One adapter a model runner; everything else knows no runner."""
