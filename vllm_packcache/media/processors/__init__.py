"""What turns a request for a video into token ids, and ids into pictures: one file a kind of model."""
