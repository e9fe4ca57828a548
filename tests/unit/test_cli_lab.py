"""`fusionroute lab build`: what may be asked for."""

from __future__ import annotations

from click.testing import CliRunner

from fusionroute.cli import main
from fusionroute.cli.lab import parse_seeds, parse_variants


def test_seeds_and_variants_are_lists_whose_faults_are_named() -> None:
    assert parse_seeds("3") == [3]
    assert parse_seeds("1, 2,10") == [1, 2, 10]
    assert parse_variants("") == ()
    assert parse_variants("merge_ties,cdpo_bias0") == ("merge_ties", "cdpo_bias0")
    assert "single_dpo" in parse_variants("all")
    for options, fault in (
        (("--seeds", "1,1"), "'1,1' is not a list of different whole numbers"),
        (("--seeds", "1,-2"), "is not a list of different whole numbers"),
        (("--variants", "cdpo"), "'cdpo' is not one of all, cdpo_bias0"),
        (("--seeds", "1,2", "--output", "nowhere"), "--output takes one family"),
    ):
        result = CliRunner().invoke(main, ["lab", "build", *options])
        assert result.exit_code == 2 and fault in result.stderr
