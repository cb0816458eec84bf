"""From files and tables to batches; knows no network."""
