"""How well a router checkpoint answers: items, systems, paired statistics, tables, speed."""
