"""Networks: pure torch, built from plain values; they know no table, no configuration and no PEFT method."""
