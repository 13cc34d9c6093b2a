"""The ops of ssod_fast: one file per op, each with its public function, checks, schema, reference and fake."""
