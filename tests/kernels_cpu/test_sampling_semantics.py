"""The tests of torch's sampler, run on the C++ one: order, ties, edits, masks, extremes, errors, streams, chances."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import partial

import pytest

from tests.kernels_cpu.sampling import CpuBench
from tests.sampler import test_distribution, test_sampler, test_streams
from tests.sampler.test_distribution import (  # noqa: F401
    test_draws_follow_the_exact_distribution,
    test_positions_of_one_stream_are_drawn_independently,
)
from tests.sampler.test_sampler import (  # noqa: F401
    test_a_bad_word_is_banned_only_after_its_beginning,
    test_a_batch_equals_the_reference_row_by_row,
    test_a_grammar_that_can_only_end_ends,
    test_a_mask_that_does_not_fit_never_samples,
    test_a_slots_next_holder_inherits_nothing,
    test_bans_that_leave_nothing_are_lifted_and_the_mask_stays,
    test_both_zeros_are_one_value,
    test_equals_the_reference,
    test_extreme_parameters_equal_the_reference_in_any_company,
    test_greedy_takes_the_lowest_of_equals,
    test_logits_that_are_not_numbers_are_a_fault,
    test_masked_rows_equal_the_reference,
    test_min_tokens_holds_back_every_end,
    test_no_parameter_ends_a_worker,
    test_penalties_count_the_output_and_repetition_the_prompt_as_well,
    test_the_callers_logits_are_left_as_they_are,
    test_tokens_that_the_model_does_not_have_are_no_trouble,
    test_top_k_keeps_the_lowest_of_equals,
    test_top_p_ends_with_the_token_that_reaches_it,
    test_top_p_of_a_large_vocabulary,
    test_what_is_pruned_could_not_have_won,
)
from tests.sampler.test_streams import (  # noqa: F401
    test_a_row_has_the_same_bits_at_any_place_of_a_real_vocabulary,
    test_many_together_equal_each_alone,
    test_streams_go_on_in_whatever_company_slot_and_epoch,
)


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu(cdll: ctypes.CDLL, isa: str) -> Iterator[None]:
    """Puts CpuBench where those tests find Bench."""
    test_streams.alone.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        for module in (test_sampler, test_streams, test_distribution):
            patch.setattr(module, "Bench", partial(CpuBench, cdll, isa))
        yield
    test_streams.alone.cache_clear()
