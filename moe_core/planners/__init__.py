"""Counts -> Plan. Pure functions of integers: no rank, no clock, no framework."""
