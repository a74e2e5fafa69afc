"""Numbers about caches: what a guest asks for, what each cache would answer, and which setting to take."""
