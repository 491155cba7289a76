import gpu


def test_tables_have_a_row_for_each_batch_size_and_stage(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "REPEATS", 1)
    sizes = dict(codes=16, batch_sizes=[1, 2], train_batch=2, hidden_size=16, width=4)
    gpu.main(gpu.Arguments(device="cpu", output=str(tmp_path / "gpu.md"), **sizes))
    text = (tmp_path / "gpu.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    assert [row[0].strip("| ") for row in rows] == ["images at once", "1", "2", "training", "tokenizer", "generator"]
    assert all(
        7 <= int(row[1]) <= 19 for row in rows[1:3]
    )  # elements of a stream of 4 to 16 codes, and 4 special ones
    assert [len(row) for row in rows] == [7, 7, 7, 5, 5, 5]
    assert "GB/s copied" in text and text.splitlines()[-2] in capsys.readouterr().out
