"""The numbers that bound what comes from outside, but for those of HTTP connections and of the TCP transport. A limit here has a test at
the limit and one over it.
"""

from __future__ import annotations

MIB = 1 << 20

# One request.
MAX_N = 8
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 300
MAX_BIAS = 100.0
MAX_TEMPERATURE = 100.0
GREEDY_BELOW = 1e-4  # temperatures under this are greedy
MAX_PENALTY = 2.0  # presence and frequency, either sign
MAX_REPETITION_PENALTY = 100.0
MAX_MESSAGES = 1024
MAX_JSON_VALUES = 16384  # in the lists of a request over HTTP, token ids and schemas apart
MAX_TOOLS = 128  # of a request, and calls of a message
MAX_METADATA_ENTRIES = 16
MAX_METADATA_CHARS = 512
MAX_MODEL_NAME_CHARS = 128
MAX_SESSION_ID_CHARS = 128
MAX_SEED = (1 << 63) - 1

# One connection to the public port.
MAX_MESSAGE_BYTES = 4 * MIB
MAX_METADATA_BYTES = 16 * 1024
MAX_STREAMS_PER_CONNECTION = 256
MAX_CONNECTION_IDLE_S = 300.0  # without a call
DEFAULT_DEADLINE_S = 600.0
MAX_DEADLINE_S = 3600.0

# Files and batches (OpenAI's API). What a batch asks for is read a line at a time.
MAX_PROMPTS = 128  # of one request to /v1/completions
MAX_PROMPTS_AT_ONCE = 16  # of them
MAX_BATCH_LINE_BYTES = MAX_MESSAGE_BYTES
MAX_CUSTOM_ID_CHARS = 512
MAX_BATCH_LINES = 50_000
MAX_BATCH_ERRORS = 100  # that are told of a file that is none
MAX_OPEN_BATCHES = 32  # of a tenant
MAX_RUNNING_BATCHES = 16  # of a router process; the others wait
MAX_BATCHES = 1000  # of a tenant; then the oldest that is over is forgotten
BATCH_WINDOW_S = 24 * 3600.0
MAX_UPLOAD_BYTES = 200 * MIB
MAX_UPLOADS = 8  # at once
UPLOAD_S = 600.0
MAX_FORM_VALUE_BYTES = 256
MAX_FILE_NAME_CHARS = 255
MAX_FILES = 1000  # of a tenant
MIN_FILE_AGE_S, MAX_FILE_AGE_S = 3600, 30 * 24 * 3600  # `expires_after`
MAX_BATCH_METADATA_NAME_CHARS = 64

# Text work in the router.
TOKENIZE_TIMEOUT_S = 5.0
MAX_RENDERED_CHARS = 8 * MIB

# Structured output. What a client writes is tried in the router, in a process that may be killed; workers build it again.
MAX_FORMAT_CHARS = 64 * 1024
MAX_FORMAT_NESTING = 100
MAX_GRAMMAR_CHARS = 8 * MAX_FORMAT_CHARS  # of what the router makes of it
FORMAT_TIMEOUT_S = 2.0
MAX_FORMAT_MEMORY_BYTES = 1 << 30  # address space of the process
FORMAT_CACHE_BYTES = 16 * MIB  # in the router: text in, text out
MAX_GRAMMAR_SYMBOLS = 100_000
MAX_GRAMMAR_FUEL = 1_000_000  # to begin with: about 20 ms
MAX_STEP_FUEL = 200_000  # for the regular expressions of one token: about 15 ms
MAX_STEP_ITEMS = 50_000  # for the rules of one token
MAX_ROW_ITEMS = 500  # ways to read the output so far; a step's time grows with their cube in the worst grammars: about 25 ms
MAX_ROW_ITEMS_JSON = 2000  # a schema's rules are many, but not ambiguous; four for each optional property
MAX_LEXER_STATES = 20_000  # of about 1 kB, for each sequence
# Processor time of one sequence, where all of these were not enough: for one token, and for all, so much and so much for each.
MAX_MASK_S = 0.1
MASK_BURST_S = 1.0
MEAN_MASK_S = 0.02

# Router queues.
MAX_RUNNING_REQUESTS = 4096
MAX_QUEUED_REQUESTS = 1000
MAX_QUEUED_BYTES = 256 * MIB
MAX_QUEUED_S = 60.0
SLOW_CLIENT_S = 30.0
MAX_ATTEMPTS = 3

# Tenants.
MAX_KEYS_FILE_BYTES = 4 * MIB
MAX_TENANTS = 10_000
MAX_KEYS_PER_TENANT = 16
MAX_API_KEY_CHARS = 512
MIN_WEIGHT, MAX_WEIGHT = 0.01, 100.0
MAX_TOKENS_PER_MINUTE = 10**9

# Router and workers.
MAX_FLEET_MESSAGE_BYTES = 16 * MIB
MAX_WORKERS = 256
MAX_ROUTERS = 16  # that a worker attaches to
MAX_FRAMES_QUEUED = 1024
HELLO_TIMEOUT_S = 5.0
REPORT_EVERY_S = 1.0
SUSPECT_AFTER_S = 3.0  # without a report
DEAD_AFTER_S = 10.0
SUSPECT_FOR_S = 30.0  # after breaking the protocol
KEEPALIVE_TIME_S = 10.0
KEEPALIVE_TIMEOUT_S = 3.0
MAX_WORKER_ID_CHARS = 128
MAX_INDEXED_BLOCKS = 4_000_000  # in the router's prefix index, of all workers together; about 150 bytes each
MAX_TRANSPORT_CHARS = 32
MEASURE_EVERY_S = 1.0  # pairs are measured anew at most this often, whoever asks
MEASURE_PAIR_S = 1.0  # one pair may take this long
MEASURE_TIMEOUT_S = 5.0  # and all of them

# The hand-off.
MAX_CONTROL_BYTES = 64 * 1024
MAX_SLOT_BYTES = 64 * MIB
MAX_SLOT_KEY_BYTES = 256
OFFER_PARKED_S = 2.0
MAX_PARKED_OFFERS = 256
GRANT_WAIT_S = 5.0
REDIRECT_WAIT_S = 5.0  # a prompt without a receiver waits this long for the router to name one
MAX_REDIRECTS = 2  # of one attempt
PREFILL_TIMES_WAIT_S = 0.25  # a finished answer's summary waits this long for what prefill measured
BAD_PAIR_S = 30.0  # two workers whose transfer broke, though both live, are not paired for this long
PROGRESS_S = 2.0
HOLD_S = 30.0

# A model directory.
MAX_CONFIG_BYTES = 1 * MIB
MAX_TOKENIZER_BYTES = 128 * MIB
MAX_TEMPLATE_CHARS = 256 * 1024
MAX_SAFETENSORS_HEADER_BYTES = 16 * MIB
MAX_TENSORS = 100_000
MAX_LAYERS = 1024
MAX_QUANT_GROUPS = 64  # ways of storing a matrix in one quantization_config
MAX_HIDDEN_SIZE = 1 << 17
MAX_VOCAB_SIZE = 1 << 21
MAX_POSITIONS = 1 << 24
