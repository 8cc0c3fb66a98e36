"""The line service: stations that wait for parts, judge them and record the results, for months."""
