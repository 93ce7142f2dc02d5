"""Every limit of the protocol, with its unit and its reason. Nothing else may hard-code one."""

from __future__ import annotations

from typing import Final

# --- bytes on the wire -------------------------------------------------------------------------------------
GOSSIP_RECORD_BYTES_MAX: Final = 32 * 1024  # a bundle; py-libp2p drops RPCs above 1 MiB without a word
MESSAGE_BYTES_MAX: Final = 1024 * 1024  # one direct message: the largest is a check request with its receipts
CONTROL_BODY_BYTES_MAX: Final = 8 * 1024 * 1024  # one control call; programs and data travel as blobs
BLOB_BYTES_MAX: Final = 16 * 1024**3  # one blob: a 1.3B-parameter AdamW checkpoint in float32
BLOB_CHUNK_BYTES: Final = 1024 * 1024  # the unit of transfer, resume and hashing of a blob

# --- programs ----------------------------------------------------------------------------------------------
PROGRAM_BYTES_MAX: Final = 16 * 1024 * 1024  # 7B parameters is about 6,218 nodes; 16 MiB is 20 times that
PROGRAM_NODES_MAX: Final = 100_000
PROGRAM_INPUTS_MAX: Final = 20_000
PROGRAM_CONSTANTS_MAX: Final = 1024  # literal tensors
PROGRAM_OPERATIONS_MAX: Final = 2**60  # operations of one step: what TaskSpec can state
PROGRAM_PEAK_BYTES_MAX: Final = 2**44  # bytes one step holds: 16 TiB, more than any machine that could bid
LITERAL_BYTES_MAX: Final = 64 * 1024  # one literal tensor: a rotary table, not a weight
NODE_LIST_MAX: Final = 4096  # tensors one `cat` joins: a 64x64 convolution window
PRODUCT_LENGTH_MAX: Final = 2**31  # the inner dimension of a product, in elements
PRODUCT_LENGTH_22_MAX: Final = 2**21  # the same at width 22, where an int64 holds no longer sum
RANDOM_WORDS_MAX: Final = 2**34  # of one draw: the block index is one 32-bit word and a block gives four
RANDOM_NODES_MAX: Final = 2**31 - 1  # stream numbers below those of the init rules
TENSOR_RANK_MAX: Final = 8
TENSOR_ELEMENTS_MAX: Final = 2**40
TASK_STEPS_MAX: Final = 10_000_000
TASK_SEGMENTS_MAX: Final = 1024  # receipts of one agreement travel in one message

# --- checkpoints -------------------------------------------------------------------------------------------
SAFETENSORS_HEADER_BYTES_MAX: Final = 16 * 1024 * 1024
SAFETENSORS_TENSORS_MAX: Final = 20_000
TILE_SIDE: Final = 32  # DESIGN §7: a tensor's root is over its 32x32 float32 tiles of 4 KiB

# --- gossip and peers --------------------------------------------------------------------------------------
GOSSIP_RECORDS_PER_SECOND_MAX: Final = 200  # per author; above it the author's records are dropped and counted
GOSSIP_BURST_RECORDS: Final = 1_000  # of one author at once: what waited 5 s behind a line that stood still
GOSSIP_OWN_BURST_RECORDS: Final = 200  # that we publish at once; the rest waits for the next ticks
GOSSIP_RECORDS_PER_FORWARDER_MAX: Final = 2_000  # a second from one neighbour: ten authors at their most
DIRECT_RECORDS_PER_SECOND_MAX: Final = 1_000  # from one connection, beside a burst of one whole settlement log
OUTBOX_RECORDS_MAX: Final = 8_192  # records that wait to be published: 40 s at the most we may
DROP_AUTHORS_MAX: Final = 1_024  # (reason, author) told apart in what was dropped; others of a reason count as one
DROP_NEWS_SECONDS: Final = 10.0  # what was dropped is logged so often, one line a reason
PEERS_MAX: Final = 1000  # connections; stock py-libp2p fills at 500 half-open ones
CLOCK_SKEW_NS_MAX: Final = 300 * 10**9  # a record dated further ahead than this is refused
CLOCK_STEP_NS: Final = 5 * 10**9  # a machine's clock that is set by more than this has jumped
CLOCK_DOUBT_NS: Final = 10 * 10**9  # a jump is believed when it has lasted so long: some are taken back at once
CLOCK_SLEW_PERMILLE: Final = 5  # by which deadlines run faster or slower until they agree with the clock again
RECORD_LIFETIME_NS_MAX: Final = 24 * 3600 * 10**9  # nothing gossiped lives longer than a day
SIGNATURES_REMEMBERED_MAX: Final = 32_768  # right ones not computed again, 10 MiB: a burst and the settlement log
OPENED_REMEMBERED_MAX: Final = 4_096  # envelopes and messages that were opened, not decoded again; 4 MiB of receipts
OPENED_BYTES_MAX: Final = 2_048  # a larger envelope is opened each time: 16 MiB at most are remembered
SIGNATURES_AHEAD_MIN: Final = 8  # fewer are computed sooner where they are used than handed to threads
COSIGNED_AHEAD_MAX: Final = 1_024  # words for receipts made before the node asks for them, 1 MiB: four turns of them

# --- money -------------------------------------------------------------------------------------------------
MICRO_PER_CREDIT: Final = 1_000_000
AMOUNT_MICRO_MAX: Final = 10**15  # a billion credits: sums of 1,000 of them stay far inside 63 bits
STAKE_MOVE_MICRO_MIN: Final = 1_000  # a move of less would let a credit fill a sixteenth of everybody's log for good
MOVES_KEPT_MAX: Final = 64  # moves of its own stake that a peer remembers; one that ended gives way
UNBONDINGS_OF_OWNER_MAX: Final = 8  # withdrawals under way at once; a penalty takes from each, in one entry
PROFIT_ASSUMED_PERMILLE: Final = 100  # of a price, what an honest solver keeps: false positives must not eat it
FALSE_POSITIVES_ASSUMED_PPM: Final = 1_000  # of honest deals: exact mode has none, tolerant mode must stay below

# --- mutual credit (peer/credit.py, peer/netting.py) -------------------------------------------------------
CREDIT_LINES_MAX: Final = 1_024  # given or got by one peer: people it knows
CREDIT_DEALS_MAX: Final = 4_096  # of one pair, not netted yet: 5 MiB of rows; then no new deal before a netting
CREDIT_LIFETIME_NS_MAX: Final = 3_660 * 86_400 * 10**9  # ten years: a mistyped number of days, not a rule of trade
CREDIT_REPEAT_NS: Final = 60 * 10**9  # a line is told again to its debtor: one message may be lost
CREDIT_CYCLE_MAX: Final = 6  # parties of a clearing: longer ones are rare and take everybody's signature
CREDIT_CLEARINGS_MAX: Final = 16  # proposed from one look at the debts, and kept open by one peer
CREDIT_PATHS_MAX: Final = 4_000  # looked at for cycles: at most 0.1 s; a group of friends has hundreds
CREDIT_DEBTS_TOLD_MAX: Final = 256  # of one peer, to one it has an account with
CREDIT_HOLD_NS: Final = 600 * 10**9  # a clearing that one party does not sign holds the others' debts so long
HOUSE_RESEND_NS: Final = 10 * 10**9  # an unsigned availability pay is sent again (peer/house.py)
HOUSE_PERIODS_KEPT: Final = 48  # hours that its rows are kept: of today and yesterday, in any time zone
RERUN_EVERY_NS: Final = 10 * 10**9  # between two orders of a house: each takes a run of its own (peer/reruns.py)
RERUNS_OPEN_MAX: Final = 4  # orders of a house at a time: as many channels wait
RERUN_SECONDS: Final = 300  # the longest re-run, at the speed that its peer proved: the house spends about as long
RERUN_PATIENCE_NS: Final = 120 * 10**9  # an order that nobody has taken is withdrawn after this
RERUN_DEADLINE_NS: Final = 3600 * 10**9  # a re-run must be done by then; twelve times what it may take
RERUN_REST_NS: Final = 600 * 10**9  # before another order to a peer that did not do the last one
RERUN_DAYS_KEPT: Final = 3  # of rows of re-runs: a budget is that of a day
NETTING_COVERS_MAX: Final = 512  # deals and clearings of one netting: 40 KiB in a message

# --- the node ----------------------------------------------------------------------------------------------
TICK_MS: Final = 100  # timers and gossip bundles; one tick costs about 50 microseconds
RESEND_NS: Final = 2 * 10**9  # an unanswered direct message is repeated after this
OFFER_REPEAT_NS: Final = 5 * 10**9  # an open offer is gossiped again: gossip may lose it
ASK_REPEAT_NS: Final = 60 * 10**9  # a live ask is gossiped again, well inside its lifetime of ten minutes
SYNC_NS: Final = 15 * 10**9  # how often the settlement log is compared with one connected peer's
BUNDLE_RECORDS_MAX: Final = 64  # records gossiped together per tick
BOOK_OFFERS_MAX: Final = 10_000
BOOK_ASKS_MAX: Final = 100_000
BOOK_BIDS_PER_OFFER_MAX: Final = 256
BOOK_OFFERS_PER_AUTHOR_MAX: Final = 1_024  # a daemon has up to 256 jobs open, each with up to three profiles
BOOK_ASKS_PER_AUTHOR_MAX: Final = 64
OFFERS_LOOKED_AT_MAX: Final = 200  # offers a solver considers again in one tick: 2 ms, or 30 ms if it bids on all
WITNESS_PLACES_MAX: Final = 10_000  # first records kept to prove a second one: some 5 MB
BAR_NS: Final = 24 * 3600 * 10**9  # no business with who signed twice: longer than any record of it lives
BARRED_MAX: Final = 10_000  # peers barred at a time; a key costs nothing, so the list must be bounded
ROUND_COLUMNS_MIN: Final = 512  # bids of a round from which columns are faster than records
ROUND_THREAD_MIN: Final = 8_192  # bids of a round from which it is played in a thread: it takes some 10 ms
PLACING_THREAD_MIN: Final = 400  # placements of a run's units from which a thread looks at them: some 50 ms
PLANS_AWAITED_MAX: Final = 8  # runs that are being planned for people at this peer, one after the other
PLACING_PLAIN_BYTES_MAX: Final = 64 * 1024 * 1024  # 256 units of 256 bids are 25 MiB, reports of all links 6 more
PLACINGS_KEPT_MAX: Final = 100  # of runs, with all their bids and reports of links, some 100 kB each for four units
MATCHES_KEPT_MAX: Final = 1_000  # with all their bids, some 10 kB each in a market of twenty solvers
JOBS_OPEN_MAX: Final = 256  # of one submitter's daemon
PENDING_SETTLEMENT_MAX: Final = 1024  # records that wait for one they depend on
PENDING_RETRY_NS: Final = 10 * 10**9  # between two looks at all that wait: 50 ms if all places are taken
PENDING_MOVES_MAX: Final = 256  # stake moves among them that wait for funds: the rest is left for other records
PENDING_MOVES_OF_OWNER_MAX: Final = 4  # of one owner: an add that waits for a pay, and some changes of mind
PENDING_MOVES_OF_STRANGERS_MAX: Final = 64  # of owners that never had money, one each: keys cost nothing
SETTLEMENT_LOG_MAX: Final = 16_384  # ids one SyncIds message can carry; beyond it notaries take over
EVENTS_PER_JOB_MAX: Final = 20_000  # lines kept for `job logs`

# --- matching ----------------------------------------------------------------------------------------------
EXPLORATION_PERMILLE: Final = 50  # rounds in which a newcomer goes first, or nobody new ever gets work
PRICE_MOVE_SHARE: Final = 4  # a move of an ask: this part of the way to the price at which demand meets supply
PRICE_FALL_SHARE: Final = 32  # of the way to the floor, while a slot is idle and nothing goes without
PRICE_NEAR_SHARE: Final = 16  # who pays this part less than is asked, and stands there, is taken
PRICE_CALM_ROUNDS: Final = 5  # between two moves, but each round while a slot has just become free
PRICE_TELL_NS: Final = 5 * 10**9  # between two asks that differ in price by an eighth or more
PRICE_TELL_SHARE: Final = 8
PRICE_PATIENCE_ROUNDS: Final = 8  # a slot idle for longer does not believe that anybody goes without
PRICE_NEEDS_MAX: Final = 64  # different needs of memory that one move of a price weighs: up to 6 ms each in a full book
PROPOSALS_PER_SUBMITTER_MAX: Final = 16  # that wait for one solver: a round gives it one job of each submitter
PROPOSALS_WAITING_MAX: Final = 256  # for one solver's answer, up to 32 KiB each; one a bid, for about a round
PASSED_OVER_MAX: Final = 5  # times in a row that one solver may bid and take other work before its bids rest
NEWCOMER_DEALS: Final = 10  # below this many verified deals a solver is a newcomer (BOINC's rule, NOTES)
DIVERGED_SOLVERS: Final = 2  # a job fails as diverged when this many solvers say so: one could lie

# --- sandboxed worker (DESIGN §12) ----------------------------------------------------------------------------
# Names of the levels 0 to 4 that offers, asks and bids carry; what each is worth is proven by worker/sandbox.py.
SANDBOX_LEVELS: Final = ("NONE", "LIMITS", "FILTERED", "NAMESPACED", "CONTAINED")
SANDBOX_FRAME_BYTES_MAX: Final = 64 * 1024  # one reply frame; checkpoints follow their header as raw bytes
SANDBOX_REQUEST_BYTES_MAX: Final = MESSAGE_BYTES_MAX + 64 * 1024  # the task as it travels, plus names and numbers
SANDBOX_LOSSES_KEPT_MAX: Final = 100_000  # of one segment, for people's curves: a stranger may ask for 10M steps in one
SANDBOX_ARRAYS_MAX: Final = 64  # as many as a TaskSpec holds; with program and base far below SCM_MAX_FD (253)
SANDBOX_TEXT_CHARS_MAX: Final = 2000  # one sentence a worker says about its failure
SANDBOX_LOG_KEPT_BYTES: Final = 64 * 1024  # the last of stdout and stderr: where the cause of a failure stands
SANDBOX_LOG_BYTES_MAX: Final = 16 * 1024 * 1024  # a worker that prints more is killed
SANDBOX_START_SECONDS_MAX: Final = 60.0  # cold import of torch takes 2-6 s, 10 times that on a loaded machine
SANDBOX_DEATH_SECONDS_MAX: Final = 10.0  # from SIGKILL to proven death; longer means a stuck kernel
SANDBOX_PROBE_SECONDS_MAX: Final = 20.0  # one canary; it takes 0.2-0.7 s
SANDBOX_POOL_MAX: Final = 2  # warm workers of about 350 MB each
SANDBOX_WARM_SECONDS_MAX: Final = 600.0  # an unused warm worker is stopped: an idle daemon must stay small
SANDBOX_WARM_HEAP_BYTES: Final = 64 * 1024**2  # pages a warm worker already holds: 40 ms of a job's start
SANDBOX_SCRATCH_BYTES: Final = 16 * 1024 * 1024  # /scratch inside; a graph writes nothing there
SANDBOX_FEED_BYTES: Final = 2 * 1024 * 1024  # of a unit's tensors on the way into its worker, beside what it holds
SANDBOX_PROCESSES_MAX: Final = 64  # processes and threads together, beside a thread for each core
SANDBOX_STACK_BYTES: Final = 8 * 1024 * 1024  # of a thread, the usual default; RLIMIT_DATA does not count stacks
SANDBOX_FILES_MAX: Final = 256  # open descriptors: 66 inputs and what Python and torch open
SANDBOX_MEMORY_BYTES_MIN: Final = 1024 * 1024 * 1024  # torch alone takes 300 MB, its libraries mapped 1 GB
SANDBOX_ADDRESS_SLACK_BYTES: Final = 16 * 1024**3  # libraries and arenas reserve addresses they never fill
SUSPEND_SECONDS: Final = 10  # a worker hands over its state in this, else it is killed; a small model takes 0.1 s
SUSPEND_SECONDS_MAX: Final = 60  # the most an owner may allow: a control call must still be answered in 120 s
SUSPENDED_STATES_MAX: Final = 8  # kept at once, the oldest gives way: a deal for each slot and the queued checks
SUSPENDED_RECORD_BYTES_MAX: Final = 1024 * 1024  # 100,000 losses of 9 bytes and some roots
FREED_MEMORY_KEPT_BYTES_MAX: Final = 512 * 1024**2  # by a worker: page faults cost exact products 3 times their work

# --- the key file and the wallet ---------------------------------------------------------------------------
PASSPHRASE_CHARS_MIN: Final = 8
PASSPHRASE_BYTES_MAX: Final = 1024
KEY_PASSES: Final = 3  # argon2id, libsodium's "moderate": about a second of one core
KEY_MEMORY_BYTES: Final = 256 * 1024 * 1024
KEY_PASSES_MAX: Final = 20  # what a key file of others may ask for: a minute
KEY_MEMORY_BYTES_MAX: Final = 2 * 1024**3
WALLET_BYTES_MAX: Final = 64 * 1024**3  # a backup: a store of some ten million receipts
WALLET_HEADER_BYTES_MAX: Final = 1024 * 1024  # key and network file of a backup
WALLET_CHUNK_BYTES: Final = 1024 * 1024  # of a backup, sealed and checked by itself
RESTORED_LISTEN_NS: Final = 20 * 10**9  # a restored peer hears at least so long: longer than SYNC_NS

# --- ledger and store --------------------------------------------------------------------------------------
BALANCE_MICRO_MAX: Final = 2**62  # one account, and all deposits together: SQLite and the wire hold 63 bits
ENTRY_POSTINGS_MAX: Final = 256  # one entry: both parties' buckets and a posting for each share
ENTRY_SHARES_MAX: Final = 240  # fees or checker costs of one entry; leaves room for the parties' postings
ENTRY_MEMO_CHARS_MAX: Final = 200
STORE_TABLE_CHARS_MAX: Final = 32  # the name of a key-value table
STORE_KEY_BYTES_MAX: Final = 256
STORE_VALUE_BYTES_MAX: Final = 2 * 1024 * 1024  # one record or one node snapshot; programs and data are blobs
PLACING_BYTES_MAX: Final = STORE_VALUE_BYTES_MAX - 16 * 1024  # of a row, beside the ids of its deals
STORE_GROUP_ROWS_MAX: Final = 100_000  # one transaction: about a second of writing on a slow disk
STORE_BUSY_MS: Final = 5_000  # an inspecting sqlite3 shell may hold the file so long before we give up
STORE_WHOLE_CHECK_BYTES_MAX: Final = 16 * 1024 * 1024  # a smaller store is verified whole before it opens: a second
STORE_SNAPSHOT_ENTRIES: Final = 4_096  # journal entries a start folds at most: a quarter of a second
STORE_CACHE_KIB: Final = 32 * 1024  # pages kept in memory: the inner pages of a store of some gigabytes
STORE_CHECKPOINT_PAGES: Final = 4_096  # of the log, 16 MiB, before it is written back: fewer random writes
STORE_WAL_BYTES_MAX: Final = 64 * 1024 * 1024  # the log file is cut back to this after a burst
DB_ROWS_MAX: Final = 10_000  # of one `ichiba db` answer
DB_CELL_BYTES: Final = 64  # of a value shown in hex
DB_VALUE_BYTES_MAX: Final = 64 * 1024 * 1024  # a query may build no longer one
EVENT_JOB_CHARS_MAX: Final = 128
EVENT_LINE_CHARS_MAX: Final = 4_096  # a longer log line is cut and marked, never refused
EVENTS_MAX: Final = 200_000  # the newest lines of all jobs: at most about 800 MB, typically 20 MB
WORK_FAILURES_MAX: Final = 3  # a solver tries a failing worker this often before it gives the deal up
CHECKS_QUEUED_MAX: Final = 4  # a checker takes no more cases than this at a time

# --- connections and streams (peer/yamux.py, peer/host.py) -------------------------------------------------
MUX_WINDOW_BYTES: Final = 256 * 1024  # the yamux specification's initial window of a stream
MUX_WINDOW_BYTES_MAX: Final = 1024 * 1024  # what a stream whose reader keeps up grows to: 20 MB/s at 50 ms
MUX_FRAME_BYTES_MAX: Final = 65_507  # on a link that is not quick: what is urgent waits for one frame
NOISE_BUFFER_BYTES: Final = 288 * 1024  # each way, so that 256 KiB and their headers pass at once and stay in a cache
MUX_STREAMS_INBOUND_MAX: Final = 64  # open streams one peer may hold: 64 MiB of windows at the very worst
MUX_STREAMS_OUTBOUND_MAX: Final = 64  # as many as the other side accepts
MUX_AT_ONCE_BYTES_MAX: Final = 256 * 1024  # one frame, given to the socket as a whole, where it takes that at once
MUX_SHORT_BYTES: Final = 16 * 1024  # leave with a frame of data; are copied when they come, for a view keeps a message
MUX_QUICK_SECONDS: Final = 0.02  # which is: within this, the turns of other tasks meanwhile (3-5 ms) included
MUX_OUTBOX_BYTES_MAX: Final = 512 * 1024  # framed bytes that wait for the socket; senders wait above it
MUX_CONTROL_FRAMES_MAX: Final = 1024  # answers that wait; who provokes more is flooding
MUX_KEEPALIVE_SECONDS: Final = 10.0  # silence after which we ping
MUX_SILENCE_SECONDS_MAX: Final = 30.0  # silence after which the connection is dead
MUX_STALL_SECONDS_MAX: Final = 30.0  # a socket that takes no byte for so long is dead
MUX_LINGER_SECONDS_MAX: Final = 60.0  # a stream we closed and the peer did not is reset after this
HANDSHAKE_SECONDS_MAX: Final = 4.0  # Noise and yamux together; NOTES: with 4 s a half-open flood is survived
HALF_OPEN_PER_ADDRESS_MAX: Final = 64  # unauthenticated connections of one address; the oldest gives way
HALF_OPEN_MAX: Final = 256  # of all addresses
INBOUND_PER_ADDRESS_MAX: Final = 256  # connections of one address: a swarm behind one router, or on one machine
CONNECTIONS_PER_PEER_MAX: Final = 2  # two peers that dial each other at once make two
NEGOTIATE_BYTES_MAX: Final = 1024  # one multistream-select line
NEGOTIATE_SECONDS_MAX: Final = 10.0
CONNECT_SECONDS_MAX: Final = 10.0  # one dial with its handshake; 20-250 ms on a LAN
SEND_SECONDS_MAX: Final = 10.0  # one direct message, connecting included
KNOWN_PEERS_MAX: Final = 1024  # peers whose addresses we keep and redial; the oldest gives way
KNOWN_ADDRESSES_PER_PEER_MAX: Final = 8
REDIAL_SECONDS_MIN: Final = 1.0
REDIAL_SECONDS_MAX: Final = 60.0
HOST_EVENTS_MAX: Final = 512  # events that wait for the node; gossip may fill half of it, the rest waits
MESSAGES_PER_SECOND_MAX: Final = 200  # direct messages read from one peer; above it the stream is read slower
GOSSIP_PER_FORWARDER_MAX: Final = 1000  # new gossip messages a second from one neighbour, about a core's worth
GOSSIP_BYTES_PER_SECOND_MAX: Final = 8 * 1024 * 1024  # of all neighbours: the message cache keeps 6 s of it
GOSSIP_QUEUE_BYTES_MAX: Final = 8 * 1024 * 1024  # what waits for one slow neighbour; above it is dropped
GOSSIP_QUEUE_RPCS_MAX: Final = 1024  # stock py-libp2p: 32
GOSSIP_CONTROL_IDS_MAX: Final = 512  # message ids read from one RPC's IHAVE
GOSSIP_WANTED_IDS_MAX: Final = 32  # distinct messages one RPC may ask back: 32 x 32 KiB is one full RPC
PENALTIES_MAX: Final = 8  # penalties, one forgiven a minute, at which a peer is banned
BAN_SECONDS: Final = 600.0
STANDINGS_MAX: Final = 10_000  # peers whose penalties are remembered; the oldest is forgotten

# --- blobs on the wire -------------------------------------------------------------------------------------
BLOB_PIPELINE_CHUNKS: Final = 8  # chunks asked for ahead: 8 MiB in flight
BLOB_STREAM_WINDOW_BYTES: Final = 4 * 1024**2  # of the muxer, for a download we asked for: 40 MB/s at 100 ms
BLOB_STREAMS_PER_PEER_MAX: Final = 4  # downloads one peer may run here at once
BLOB_STREAMS_MAX: Final = 32  # of all peers
BLOB_IDLE_SECONDS_MAX: Final = 30.0  # a download that moves no byte for so long goes to another peer
SEALED_KEYS_GIVEN_MAX: Final = 8  # keys of single blobs in one box: a notary gets two
SEALED_KEYS_PER_BLOB_MAX: Final = 64  # sealed jobs that may name one blob here; the oldest key is forgotten
SEALED_MANIFESTS_MAX: Final = 64  # of sealed blobs kept in memory: each cost a pass over its blob
BLOB_PARTIALS_MAX: Final = 64  # unfinished downloads kept for resuming; the oldest is removed
SOLVER_REST_NS: Final = 120 * 10**9  # a solver that was lost or refused may have the same job again after this

# --- who knows whom (peer/book.py) -------------------------------------------------------------------------
LINKS_WANTED: Final = 32  # below this a host dials peers it heard of: deals are made with those it is linked to
REDIALS_MAX: Final = 6  # failures in a row after which an address nobody asked for is forgotten
PEERS_TOLD_MAX: Final = 64  # peers whose addresses are told to a newcomer
ANNOUNCED_ADDRESSES_MAX: Final = 4  # addresses one peer announces, and one invite holds
ANNOUNCE_SECONDS: Final = 300.0  # our addresses are gossiped again: at 10,000 peers 33 records/s
MOOT_RECORDS_MAX: Final = 4  # valid records of one channel after its end: kept, without effect
FREEZE_WINDOWS: Final = 10  # claim windows a claim waits longer after one wrong verdict: time for a quorum

# --- the daemon --------------------------------------------------------------------------------------------
INBOX_MAX: Final = 4096  # inputs that wait for the node
INPUTS_PER_COMMIT_MAX: Final = 256  # group commit: one fsync for all that came together
OUTGOING_MESSAGES_MAX: Final = 1024  # direct messages that wait for one slow peer; more are dropped and counted
LISTENER_EVENTS_MAX: Final = 4096  # events that wait for one `job logs -f`
SEGMENT_SECONDS_MAX: Final = 3600  # wall time of one segment before its worker is killed
BLOB_STORE_BYTES_MAX: Final = 64 * 1024**3  # unpinned blobs beyond this are evicted, oldest first

# --- bundles (protocol/bundle.py) --------------------------------------------------------------------------
BUNDLE_BYTES_MAX: Final = 64 * 1024 * 1024  # proof.json: 1,024 receipts are 1.5 MB in hex, times the deals of a bad day
BUNDLE_DEALS_MAX: Final = 1024
BUNDLE_DEAL_RECORDS_MAX: Final = 64  # verdicts, or closing records, of one deal
NETWORK_FILE_BYTES_MAX: Final = 1024 * 1024  # 5,000 deposits

# --- the control socket (peer/control.py) ------------------------------------------------------------------
CONTROL_HEADER_BYTES_MAX: Final = 16 * 1024  # h11's own limit of one incomplete event
CONTROL_HEADER_SECONDS_MAX: Final = 10.0  # a client that does not finish its headers in this is cut off
CONTROL_IDLE_SECONDS_MAX: Final = 60.0  # a body, or a reader, that moves no byte for so long is cut off
CONTROL_KEEP_SECONDS_MAX: Final = 30.0  # an idle connection is kept for the next call
CONTROL_CONNECTIONS_MAX: Final = 64  # a dashboard and a few dozen followers
CONTROL_CHUNK_BYTES: Final = 256 * 1024  # of a blob on its way through the socket

# --- preparing a job (worker/prepare.py) -------------------------------------------------------------------
WORKER_BASE_BYTES: Final = 512 * 1024**2  # torch and its libraries, beside what a step holds
TRIAL_OPERATIONS_MAX: Final = 20 * 10**9  # a step up to this is tried before money is spent: seconds on one core
JOB_FILE_BYTES_MAX: Final = 64 * 1024
RESULT_SHOWN_BYTES_MAX: Final = 256 * 1024**2  # a last state up to this is read by `job show`: about a second
CHECKER_STAKES_MAX: Final = 8  # least stakes that count when a checker is drawn: one whale is drawn 8 times as often
CHECKER_REST_NS: Final = 30 * 10**9  # a checker that declined or vanished may be asked again after this
FRUITLESS_DEALS_MAX: Final = 20  # a job fails when so many deals in a row bring it no further

# --- bench cards (protocol/bench_card.py) ------------------------------------------------------------------
BENCH_LINKS_MAX: Final = 4096  # products of one chain; with its side it bounds what a check costs
BENCH_OPERATIONS_MAX: Final = 2**47  # of one chain: 30 s at 4.7 Top/s, and at most 512 links of side 4,096
BENCH_MEMORY_BLOCK_BYTES: Final = 8192  # one cell of the memory that is filled; three are opened for each probe
BENCH_MEMORY_BLOCKS_MAX: Final = 2**22  # 32 GiB; filling runs at about 150 MB/s
BENCH_PROBES: Final = 16  # 16 x 3 blocks of 8 KiB and their paths fit a message; 10 % missing is seen 4 times in 5
BENCH_CARD_LIFETIME_NS: Final = 6 * 3600 * 10**9  # a machine may be sold, throttled or shared after it was measured
BENCH_TARGET_NS: Final = 30 * 10**9  # a chain of so long: a check, and a network's 100 ms, are under 1 % of it
BENCH_WINDOW_FACTOR: Final = 3  # a challenge is open so many times the expected duration, for a loaded machine
BENCH_WINDOW_SLACK_NS: Final = 20 * 10**9  # storing the result, and the way there and back with resendings
BENCH_WINDOW_NS_MAX: Final = 15 * 60 * 10**9
BENCH_FILL_BYTES_PER_SECOND_MIN: Final = 20 * 10**6  # a slower filling is given up: a fifth of what one core does
BENCH_PROBE_NS: Final = 5 * 10**9  # from the probe to its answer: two sendings of a message, or 1 GB filled anew
BENCH_REST_NS: Final = 60 * 10**9  # one peer is challenged at most so often: its chain costs 30 s, our check 0.1 s
BENCH_GATHER_NS: Final = 30 * 10**9  # a challenge waits so long for look-alikes to be ready: torch starts in 2-6 s
BENCH_ASK_NS: Final = 2 * BENCH_GATHER_NS  # an ask without a challenge is given up after this
BENCH_INVITED_REST_NS: Final = 1800 * 10**9  # an invitation of one peer is followed so often, for each costs a minute
BENCH_ANY_INVITED_REST_NS: Final = 300 * 10**9  # and of all peers together
BENCH_REPEAT_NS: Final = 600 * 10**9  # a card is gossiped so often; a peer just met is told at once
BENCH_FIRST_SPEED_MAX: Final = 2 * 10**12  # operations a second: a chain is not sized by more at a peer's word, or
# anybody could send us a forged result that takes seconds to check; it may be four times what was proven before
BENCH_OPEN_MAX: Final = 16  # challenges this peer has open at a time
BENCH_JOB_SHARE: Final = 4  # a first guess: an exact training step runs at a third to a quarter of pure products
BENCH_CARDS_MAX: Final = 10_000  # cards of others that are remembered; the oldest gives way
BENCH_FILE_BYTES_MAX: Final = 33 * 1024 * 1024  # a card and the largest results, twice 4,096 x 4,096 bytes
UNPROVEN_SPEED_MAX: Final = 50 * 10**9  # operations a second a peer is believed without our own challenge: one core
UNPROVEN_SLOWDOWN_PERMILLE: Final = 2000  # what nobody proved is expected to take twice as long as it says
LINK_BYTES_PER_SECOND: Final = 1_250_000  # 10 Mbit/s, a usual uplink at home: of a link that was not measured
LINK_DELAY_GUESS_US: Final = 50_000  # one way, of a link that nobody measured: half-way across a continent
LINK_DELAY_US_MAX: Final = 60 * 10**6  # of a link that is reported
LINK_SPEED_MAX: Final = 125 * 10**9  # bytes a second: 1 Tbit/s
LINKS_REPORTED_MAX: Final = 64  # of one peer: a report is 3 KiB
LINK_REPORTS_MAX: Final = 4_096  # of all peers, some 50 MiB, and as they were signed
LINK_REPORT_NS: Final = 60 * 10**9  # between two reports of one peer: 17 records a second of a thousand
PEERS_TIMED_MAX: Final = 256  # of the connected peers: a ping each
LINK_TIME_SECONDS: Final = 15.0  # between two round trips that are timed to each peer
LINK_REPORT_LIFETIME_NS: Final = 1_800 * 10**9  # half an hour: evenings are slower than nights
LINK_SAMPLE_BYTES_MIN: Final = 256 * 1024  # a smaller download tells the delay of a link, not its speed
LINK_SPEEDS_MAX: Final = 1_024  # peers whose links were measured: those connected and some that were
SELF_TIMED_SLOWDOWN_PERMILLE: Final = 1500  # real work, but on a clock we do not know

# --- script jobs (protocol/script.py, worker/script.py) ----------------------------------------------------
SCRIPT_SECONDS_MAX: Final = 24 * 3600  # of metered time: what a machine is rented for in one piece
SCRIPT_WORDS_MAX: Final = 64  # of a command
SCRIPT_WORD_CHARS_MAX: Final = 4096
SCRIPT_INPUTS_MAX: Final = 256  # files; a folder of more is packed first. Each is one mount of its worker
SCRIPT_INPUT_BYTES_MAX: Final = BLOB_BYTES_MAX  # of all inputs together
SCRIPT_SPEC_BYTES_MAX: Final = 24 * 1024  # encoded: it travels in one proposal of at most 32 KiB
SCRIPT_PATH_CHARS_MAX: Final = 255  # the name of one input or output, folders included
SCRIPT_PATH_DEPTH_MAX: Final = 8
SCRIPT_MEMORY_BYTES_MIN: Final = 64 * 1024**2  # its supervisor takes 20 MB of it
SCRIPT_OUTPUT_BYTES_MAX: Final = 4 * 1024**3  # of all outputs: they lie in the worker's memory until it has ended
SCRIPT_OUTPUTS_MAX: Final = 1024  # files kept
SCRIPT_ENTRIES_MAX: Final = 16 * SCRIPT_OUTPUTS_MAX  # names looked at below /outputs before the search stops
SCRIPT_RESULT_BYTES_MAX: Final = 1024**2  # the list of outputs: 1,024 names of 255 letters of 3 bytes
SCRIPT_SCRATCH_BYTES_MAX: Final = 1024**3  # /scratch, counted as its memory like /outputs
SCRIPT_LATE_SECONDS_MAX: Final = 1.0  # beyond its time, for the supervisor inside to end it; then the daemon does
SCRIPT_COLLECT_SECONDS_MAX: Final = 30.0  # for outputs up to 1 GB, and in proportion above; not charged
SCRIPT_NEWS_SECONDS: Final = 1.0  # what it printed is told to the submitter this often
SCRIPT_NEWS_CHARS_MAX: Final = 3000  # and so much of it at most, the newest: fits a line of the log
SCRIPT_BEAT_SECONDS: Final = 10.0  # a silent script's solver says so often that it is there
SCRIPT_CLOCK_SLACK_PERMILLE: Final = 20  # by which two clocks may differ in how long a script ran, beside 2 s
SCRIPT_CLOCK_SLACK_NS: Final = 2 * 10**9
SCRIPT_REPLICAS_MAX: Final = 8
# --- arbitration (protocol/dispute.py) ---------------------------------------------------------------------
NOTARIES_MAX: Final = 16  # 3f + 1 with f = 5; every arbitration carries 2f + 1 of their signatures
MOVE_BYTES_MAX: Final = 8 * 1024  # the body of one move: a tile of 4 KiB, or 16 hashes, and some words
OPENING_BYTES_MAX: Final = 900 * 1024  # operands opened to the referee: 136 KiB for a block of 512, fits a message
DISPUTE_ARITY: Final = 16  # the search is 16-ary: the cheapest by measured gas (NOTES, money)
REFEREE_OPERATIONS_MAX: Final = 10**9  # of one notary in one dispute, at most paid for; a leaf of 512 takes 10**6
DISPUTE_ROUNDS_MAX: Final = 64  # a 7B transformer takes about 20; moves further ahead of the open round are not kept
OPENING_TILES_MAX: Final = 40  # tiles a block may read: 200 KiB with their paths; the search goes on above it
TRACE_BYTES_MAX: Final = 4 * 1024**3  # all values of one step, as a challenger of a tolerant task reads them
PURSUITS_MAX: Final = 4  # steps of one segment that a challenger looks into: each costs both sides a trace
QUESTION_BYTES_MAX: Final = 4096  # what a worker is asked about a step: positions and a root, 200 bytes
# --- disputes over the network (peer/arbiter.py, peer/disputant.py) ----------------------------------------
DISPUTES_OPEN_MAX: Final = 32  # one notary hears at a time: each holds a Program and at most 1 MiB of moves
DISPUTES_PER_CHALLENGER_MAX: Final = 4  # open at one notary: more would buy one challenger the bench
DISPUTES_KEPT_MAX: Final = 16  # ended ones whose moves are kept for who looks on, 2 MiB at most; the oldest gives way
JURY_YOUNGER_WAITS: Final = 4  # times the grace: of two right challenges the older has found its quorum by then
JURORS_MAX: Final = 17  # of one dispute: twice the largest tolerant_quorum of a network and one more
DISPUTE_WATCH_NS: Final = 60 * 10**9  # after the end, a looker-on asks so long for the moves it has not seen
DISPUTE_GRACE_NS: Final = 8 * 10**9  # four resendings: a move that one notary has in time reaches all in this
DISPUTE_GRACE_SHARE: Final = 4  # and at least this part of the clock, for slow links have long clocks
DISPUTE_LAPSE_CLOCKS: Final = 4  # a round without a quorum is given up after so many of its clocks
DISPUTE_CATCH_UP_ROUNDS: Final = 8  # closed rounds told in answer to one message
OPENING_PART_BYTES: Final = 512 * 1024  # of an opening, in one message
OPENING_PARTS_MAX: Final = 4  # a chunk of data with the manifest that proves it: 1.5 MiB
CASE_ASKS_MAX: Final = 6  # times a whistleblower asks for one case before it looks elsewhere
CASES_TOLD_PER_TICK_MAX: Final = 8  # answers to CaseAsk: a case is up to 1 MiB
RECHECKS_REMEMBERED_MAX: Final = 4096  # segments a whistleblower weighed already; the oldest is forgotten
RECHECK_PRIOR_DEALS: Final = 10  # a solver with a clean record of n deals is wrong in one of n + 10 (BOINC's rule)
# --- profiling and tolerant mode (protocol/profile.py); ppb: parts per billion of a segment's honest update ---
PROFILE_SEGMENTS: Final = 2  # the first, where Adam is noisiest, and the next; each whole, for noise grows in it
PROFILE_KERNELS_MIN: Final = 4  # configurations that judge
PROFILES_MIN: Final = 2  # distinct staked verifiers
PROFILES_KEPT_MAX: Final = 5  # of one task: after so many that disagree nobody will agree
PROFILE_FACTOR_MAX: Final = 10  # between two thresholds: room for machines of other kinds, unmeasured so far
THRESHOLD_FACTOR: Final = 3  # DESIGN §5.2: the threshold over the largest profiled distance
SECOND_FACTOR: Final = 2  # a second verifier clears up to so many thresholds: honest machines lie a third of one apart
UNSURE_FACTOR: Final = 10  # DESIGN §5.2: above so many thresholds it is fraud, below a second verifier decides
TOLERANCE_PPB_MIN: Final = 3_000  # of a threshold: 3 x 1e-6, the noise of a small model on the quietest machine
TOLERANCE_PPB_MAX: Final = 10**6  # DESIGN §5.2: a threshold above 1e-3 of the update tells no fraud from noise
TOLERANCE_L2_PPB_MAX: Final = 10**7  # of the L2 threshold, which one element of a small tensor can carry alone
DRIFT_PPB_MAX: Final = 10**7  # DESIGN §5.2: segments x threshold, 1 %; 3 % planted no backdoor, 10 % did (NOTES)
GAUGE_NOISE_PPB_MIN: Final = 10**7  # noise of 1 % of the update: ten times what a tensor that is judged may have
GAUGE_ULPS_MIN: Final = 16  # and beyond the rounding of the weights, in half units in the last place
GAUGE_PARTS_MAX: Final = 64  # equal parts of a tensor: heads of a fused projection
GAUGE_PART_ELEMENTS_MIN: Final = 4  # one element alone is an accident of Adam's first steps, no gauge
GAUGES_MAX: Final = 384  # tensors: weight and two moments of 128 layers; a profile must still fit 32 KiB
# --- randomness and ordered errors (peer/beacon.py, peer/forcing.py) ---------------------------------------
BEACON_WAIT_NS: Final = 30 * 10**9  # a solver begins without a beacon after this: nobody orders an error then
BEACONS_ASKED_MAX: Final = 256  # beacons this peer waits for at once: one for each deal that begins or is drawn
CORRECTION_WAIT_NS: Final = 120 * 10**9  # for the true state of an ordered error; then its segment is done again
CORRECTION_FETCH_NS: Final = 10 * 10**9  # between two attempts to get that state
# --- certified openings (peer/notary.py, peer/certificates.py) ---------------------------------------------
CERTIFY_LATE_NS: Final = CLOCK_SKEW_NS_MAX  # after a proposal's time a notary signs nothing anew: clocks differ so much
CERTIFY_NEVER_NS: Final = 24 * 3600 * 10**9  # and after this not though others did; then its promises can be forgotten
CERTIFY_END_NS: Final = 10 * 10**9  # between two rounds of questions about an agreement that was given up
RESERVATIONS_MAX: Final = 16_384  # agreements one notary holds, 1 kB each; a day's given-up ones among them
RESERVATIONS_OF_STRANGERS_MAX: Final = 4_096  # of them, promises about orders of keys that never had any money
RESERVATIONS_PER_SUBMITTER_MAX: Final = 1_024  # JOBS_OPEN_MAX jobs, each with profiles and a deal that was given up
# --- what people ask (market/filters.py, market/prints.py, peer/answers.py) --------------------------------
FOREVER_NS: Final = 2**63 - 1  # later than any time a record can hold
RUN_NS_MAX: Final = 366 * 86_400 * 10**9  # work that is believed to take longer is nobody's plan
DEADLINE_NS_MAX: Final = 366 * 86_400 * 10**9  # a job that has more time has no deadline
FILTER_CHARS_MAX: Final = 1000  # of a filter: thirty comparisons
ROWS_SHOWN_MAX: Final = 10_000  # rows of one table in one answer: 4 MB of JSON
PRINTS_MIN: Final = 10  # below so many days of distinct pairs a quantile of prices says nothing
PRINT_PAIRS_MIN: Final = 3  # and of so few pairs it says what they wish
PRINTS_AGE_NS: Final = 7 * 86_400 * 10**9  # a price a week old is no price; also what statistics look back
WHY_ASKS_MAX: Final = 2_000  # asks that `why` tries terms on: 0.1 s of the node's time; connected and cheap ones first
WHY_JOBS_MAX: Final = 8  # waiting jobs that `why` looks into when it is asked about everything
QUOTE_ASKS_MAX: Final = 2_000  # the cheapest that a quote's waiting times are reckoned from: 50 ms of the node's time
QUOTE_ROWS_MAX: Final = 10  # price limits of a quote
CLOCKS_NOTED_MAX: Final = 256  # authors whose clock seems wrong: 40 bytes each
# --- reputation (market/reputation.py) ---------------------------------------------------------------------
REPUTATION_DAY_ATTO: Final = 977_159_968_434_245_955  # 10^18 x 2^(-1/30): evidence halves in 30 days, a billing month
REPUTATION_PAIR_DEALS: Final = 4  # what one counterparty says for a peer, at most: alone it brings a bound of 0.69
REPUTATION_PAIR_LOSSES: Final = 1  # and against it: one-sided, so no more than one proved fault
# --- a guest on its owner's machine (peer/guest.py) ---------------------------------------------------------
GUEST_RULES_CHARS_MAX: Final = 16_384  # of earn.toml
GUEST_READ_SECONDS: Final = 10.0  # between two looks at the sensors
GUEST_SENSOR_SECONDS_MAX: Final = 5.0  # one of them may take; nvidia-smi takes 0.1-1 s
GUEST_CALM_NS: Final = 60 * 10**9  # a cause is away before work goes on: a pause costs the step that is under way
GUEST_HEAT_EASE_CELSIUS: Final = 5  # cooler than the limit before work goes on
GUEST_BATTERY_EASE_PERCENT: Final = 5  # fuller than the limit before work goes on
GUEST_POWER_EASE_PERMILLE: Final = 200  # less than the limit before work goes on
GUEST_DAYS_KEPT_MAX: Final = 400  # of energy: a year and its comparison
GUEST_BOOK_BYTES_MAX: Final = 1024 * 1024  # 400 days take about 60 kB
GUEST_SENSOR_FILES_MAX: Final = 256  # looked at for one reading
GUEST_SENSOR_BYTES_MAX: Final = 64 * 1024  # read of one file, or of what nvidia-smi says

# --- tensors between the units of a run (peer/tensor_links.py) --------------------------------------------------
TENSOR_PART_BYTES: Final = 256 * 1024  # of a payload at a time: beats pass between two parts, 0.2 s apart at 10 Mbit/s
TENSOR_SMALL_BYTES: Final = 16 * 1024  # what is shorter leaves together with what follows: a frame of many payloads
TENSOR_BATCH_BYTES: Final = 256 * 1024  # gathered at a time for one link
TENSOR_ITEMS_MAX: Final = 256  # beats and echoes that wait to be written; more are not sent
TENSOR_PAYLOAD_COST: Final = 256  # bytes that a payload costs beside its own, in credit: an empty one is not free
TENSOR_WINDOW_BYTES: Final = 32 * 1024**2  # that one link's receiver takes ahead of its worker: 2.5 s of 100 Mbit/s
TENSOR_STARVED_BYTES_MAX: Final = 4 * 1024**3  # beyond its window, on disk, while its worker waits for something else
TENSOR_QUEUE_BYTES: Final = 32 * 1024**2  # of one link, not yet taken by its receiver: above it `send` waits
TENSOR_MEMORY_BYTES: Final = 256 * 1024**2  # of one unit's payloads, kept or waiting, in memory; the rest is on disk
TENSOR_DISK_BYTES_MAX: Final = 64 * 1024**3  # of one unit's payloads on disk: a segment of an hour at 150 Mbit/s
TENSOR_LOG_BYTES: Final = 64 * 1024**2  # one file of payloads on disk: freed as a whole
TENSOR_HAVE_MAX: Final = 32_768  # keys that a receiver says it has, 0.6 MiB; what more it has is sent again and dropped
TENSOR_HELLO_BYTES_MAX: Final = 1024 * 1024  # one frame of greeting
TENSOR_KEYS_MAX: Final = 4_000_000  # payloads of one link remembered until released: some 500 MB, a very long segment
TENSOR_GRANT_SHARE: Final = 8  # credit is told again when this part of a window was freed
TENSOR_STREAM_WINDOW_BYTES: Final = 8 * 1024**2  # of the muxer, for who has a unit of ours: 100 MB/s at 80 ms
TENSOR_BEAT_SECONDS: Final = 1.0  # between two signs of life
TENSOR_SILENCE_SECONDS: Final = 4.0  # without any byte, beside eight round trips: the stream is given up and made anew
TENSOR_RETRY_SECONDS_MIN: Final = 0.1  # before a lost stream is made anew; twice as long each time
TENSOR_RETRY_SECONDS_MAX: Final = 2.0
TENSOR_WAITS_KEPT: Final = 32  # steps whose longest wait for a unit sets its deadline
TENSOR_WAIT_FACTOR: Final = 3  # a unit is late after so many times the longest of them
TENSOR_WAIT_SECONDS_MIN: Final = 3.0  # and this: a disk, a collection of garbage, a lost packet
TENSOR_FIRST_WAIT_SECONDS: Final = 60.0  # while there were none: a worker starts in 2-6 s, 10 times that under load

# --- placing many devices (market/placement*.py) --------------------------------------------------------------
PLACEMENT_DEVICES_MAX: Final = 2048  # 16 MB a matrix of int32; market/c/placement.c has a stack for as many
PLACEMENT_DELAY_MS_MAX: Final = 10**7  # three hours, one way: beyond any link one would train over
PLACEMENT_GBPS_MIN: Final = 1e-9  # 1 bit/s, likewise; a link of nothing has no finite cost
PLACEMENT_GBPS_MAX: Final = 1e9  # beyond the backbone of any continent
PLACEMENT_GB_MAX: Final = 1e6  # a petabyte an iteration
PLACEMENT_FILE_BYTES_MAX: Final = 256 * 1024 * 1024  # two float64 matrices of 2048 devices take 64 MiB

# --- parallel jobs (protocol/stage.py) ------------------------------------------------------------------------
PARALLEL_UNITS_MAX: Final = 256  # stages x replicas: each is a deal of its own with the one submitter
MICRO_BATCHES_MAX: Final = 256  # of one step: the unrolled program holds each one's nodes
CROSSINGS_MAX: Final = 16_384  # tensors that leave, or enter, a unit in one step: 256 micro-batches of 64
KEPT_BYTES_MAX: Final = 2 * 1024**3  # of examples' activations that a unit keeps: they are in each of its checkpoints
CROSSING_BYTES_MAX: Final = 256 * 1024**2  # one tensor between units: the daemon holds it whole while it is on its way
PAYLOAD_HEAD_BYTES_MAX: Final = 64  # what a codec may add to a tensor's own bytes; a change adds 10
UNIT_WAIT_SECONDS_MAX: Final = 1800.0  # for one tensor of a neighbour: time to replace a lost one from a thin market
TAPES_MAX: Final = 16  # segments of a unit that one check computes again; each tape is a descriptor of its worker
TAPE_WRITE_BYTES_MAX: Final = 256 * 1024  # a longer write to a tape is a thread's: the hop takes 0.1 ms
HANDOVER_BYTES_MAX: Final = 1024  # a signed Handover has some 300 bytes
UNIT_WAIT_NS: Final = 2 * 10**9  # a unit that waits so long for a neighbour says so: ten round trips to the far side
UNIT_STALL_NS: Final = 60 * 10**9  # who is waited for and makes no step in this time is replaced
LAUNCH_WAIT_NS: Final = 600 * 10**9  # a solver gives up a unit that is not launched: the others are not to be had
HELD_SILENCES_MAX: Final = 4  # times check_silence_ms that a receipt may wait for those of the other units
QUARRELS_KEPT: Final = 256  # of a run, about links: each took it back, so an honest one has few
REWINDS_MAX: Final = 8  # in a row that brought a run no further
UNIT_TAPE_BYTES_MAX: Final = 16 * 1024**3  # what a unit received in one segment: at most as much as a checkpoint
HANDOVERS_KEPT: Final = 8  # signed segments of a unit whose ends are kept, for a neighbour that restarted and asks
