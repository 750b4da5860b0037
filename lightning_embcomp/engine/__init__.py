"""The engine: logical tables routed to ordinary FBGEMM tables, one per width and precision."""
