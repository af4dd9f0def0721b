"""Gate: accept a policy only if it is surely not less safe than the last accepted one, else go back to that one."""
