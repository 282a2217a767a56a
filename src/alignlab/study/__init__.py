"""The controlled comparison of methods: plan -> shared stages -> arms x seeds -> results.json -> report.html."""
