# SPDX-License-Identifier: Apache-2.0
"""A data set through TFDS's own builder holds what `prepare` writes."""

from tests.data import raw
from vlp_jax.data.datasets import coco
from vlp_jax.data.preparation import builder, writer


def test_tfds_builds_the_same_records(tmp_path):
    import tensorflow_datasets as tfds

    source = raw.coco(tmp_path / "raw", {"train2017": 5, "val2017": 4})
    (source / "train2017" / "000000000002.jpg").write_bytes(b"<html>")
    built = builder.builder(coco, source, tmp_path / "tfds")
    built.download_and_prepare()
    assert built.info.version == "2.0.0" and built.info.file_format.value == "array_record"

    writer.write(coco, source, tmp_path / "ours", workers=1, max_bad=0.5)
    ours = tfds.builder_from_directory(tmp_path / "ours")
    assert str(ours.info.features) == str(built.info.features)
    raw_bytes = {"image": tfds.decode.SkipDecoding()}
    for split, count in (("train", 4), ("validation", 2), ("test", 2)):
        pairs = [one.as_data_source(split, decoders=raw_bytes) for one in (built, ours)]
        theirs, mine = ({record["image_key"]: record for record in records} for records in pairs)
        assert theirs.keys() == mine.keys() and len(mine) == count
        for key, record in mine.items():
            assert [*map(str, record.items())] == [*map(str, theirs[key].items())]
