"""Text: sources, streams of documents, the tokenizer."""
