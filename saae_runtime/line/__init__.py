"""The line service: stations that wait for parts, judge them and write down what they found, for months."""
