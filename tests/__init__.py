import pytest

pytest.register_assert_rewrite("langgraph_perf.testing")
