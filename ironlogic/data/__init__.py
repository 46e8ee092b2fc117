"""Conversations, what is trained of them, pictures, and problems with answers that can be checked.

chats = load_chats("my.jsonl")                  # bad rows are left out and reported: print(chats.rejected)
train, test = chats.split(0.1)
tasks = make_tasks(100, seed=3407)              # nano's own problems, order-free and order-bound
"""

from ironlogic import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "chats": "ChatError Chats load_chats make_chats",
        "masking": "encode_chats show_mask",
        "pictures": "read_picture",
        "problems": "accuracy_reward bayes_ceiling check_answer format_reward make_tasks task_chat",
        "scenes": "make_scenes scene_chats",
    },
)
