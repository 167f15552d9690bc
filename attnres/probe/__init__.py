"""The probe: interventions on depth routing, measured."""
