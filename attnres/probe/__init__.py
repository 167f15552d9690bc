"""The probe: interventions on depth routing, their effects, statistics and report."""
