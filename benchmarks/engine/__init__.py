"""The engine alone, in this process, beside what the machine allows: `python -m benchmarks.engine`.

`machine` measures how fast memory is read and numbers are multiplied here, `floors` says what a step cannot be faster than,
`loaded` runs steps of a real engine with a real pool, `rows` compares.
"""
