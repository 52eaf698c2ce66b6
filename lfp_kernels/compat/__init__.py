"""The programming interfaces of other packages, on these kernels (docs/migration.md)."""
