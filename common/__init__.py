from common.threads import wait_passively

wait_passively()  # here, because every script imports this package before it imports torch
