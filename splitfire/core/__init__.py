"""The words every part uses: errors, lifecycle tables, limits, settings, layouts, sampling parameters, telemetry."""
