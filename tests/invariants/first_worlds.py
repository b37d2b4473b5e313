"""The first world of WORLDS in which the right invariant notices a planted fault, of faults that are not noticed in one
of the first three.

A hunt begins with it and then searches as it would have. ``python -m tests.invariants.hunt --first`` lists them anew.
"""

FIRST = {
    "a_faulty_row_is_taken_for_a_good_one": 26,
    "withdrawing_ends_whatever_is_served": 9,
    "a_row_sees_a_dead_sibling": 21,
    "a_row_sees_canonical_slots_beyond_its_joint": 9,
    "idle_before_the_last_run_is_back": 4,
    "a_result_is_dropped": 4,
    "the_wrong_slot_is_committed": 17,
    "a_slot_is_leased_before_it_is_released": 3,
    "the_slot_of_a_copy_is_committed": 18,
    "what_is_thrown_away_keeps_its_slots": 82,
    "the_end_cancels_the_roots_own_run": 11,
    "the_draft_is_led_astray": 16,
    "a_stage_passes_on_other_settings": 4,
    "the_drafter_is_greedy_whatever_the_target_does": 16,
    "one_drafters_nodes_hang_under_anothers_names": 134,
    "lookup_goes_on_beyond_the_end": 7,
    "the_drafter_works_on_after_its_order": 3,
    "the_drafter_does_not_forget": 43,
    "the_drafter_forgets_its_guesses_and_not_their_slots": 18,
    "a_token_below_the_cutoff_is_sent": 140,
    "results_are_heard_at_once": 3,
    "results_are_heard_before_what_was_drafted_is_sent": 43,
    "a_result_that_has_to_wait_is_dropped": 3,
    "a_token_in_flight_gets_no_canonical_run": 3,
    "canonical_runs_are_cancelled_too": 3,
    "everybody_is_told_at_once_what_to_cancel": 16,
    "a_draft_goes_on_beyond_its_positions": 5,
    "a_follower_skips_a_layer": 3,
    "a_follower_chooses_after_the_last_pass_of_another_shard": 62,
    "the_leader_keeps_the_draw_to_itself": 8,
    "what_was_freed_is_still_offered": 12,
    "the_last_request_is_never_served": 36,
    "priorities_are_ignored": 27,
    "tokens_are_credited_to_another_request": 14,
}
