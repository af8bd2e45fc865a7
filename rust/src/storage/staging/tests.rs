use std::collections::BTreeSet;
use std::path::Path;

use super::*;
use crate::storage::directory::LocalDirectory;

fn request(overwrite: bool, names: &[&str]) -> Request {
    Request {
        overwrite,
        sync: false,
        bytes: 0,
        names: names.iter().map(|name| (*name).to_owned()).collect(),
        ..Request::default()
    }
}

const NAMES: [&str; 4] =
    ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", INDEX, "config.json"];
const INDEX: &str = "model.safetensors.index.json";

/// A model whose files all hold `text`, written but not committed.
fn begin(output: &Path, text: &str, names: &[&str]) -> Box<Staging> {
    let mut staging = Box::new(Staging::create(output, request(true, names)).expect("a place"));
    for name in names {
        let content = match *name {
            INDEX => {
                format!(r#"{{"weight_map": {{"{text}": "{}", "b": "{}"}}}}"#, NAMES[0], NAMES[1])
            }
            _ => text.to_owned(),
        };
        staging.put(name, content.as_bytes(), None).expect("written");
    }
    staging
}

fn model(output: &Path, text: &str, names: &[&str]) {
    let warnings = begin(output, text, names).commit().expect("committed").warnings;
    assert!(warnings.is_empty(), "{warnings:?}");
}

/// Every file below a directory with its content.
fn snapshot(directory: &Path) -> Vec<(String, String)> {
    let mut files = Vec::new();
    let mut folders = vec![directory.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a directory") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(directory).expect("below it").display().to_string();
                files.push((name, fs::read_to_string(&path).expect("text")));
            }
        }
    }
    files.sort();
    files
}

fn names(directory: &Path) -> Vec<String> {
    snapshot(directory).into_iter().map(|(name, _)| name).collect()
}

#[test]
fn a_model_is_written_whole_with_a_list_of_its_files() {
    let root = tempfile::tempdir().expect("a directory");
    let output = root.path().join("a/b");
    model(&output, "new", &["model.safetensors", "sub/x.json", "config.json"]);
    assert_eq!(names(&output), ["config.json", MANIFEST, "model.safetensors", "sub/x.json"]);
    assert!(missing_files(&LocalDirectory(output.clone())).is_empty());
    fs::remove_file(output.join("sub/x.json")).expect("removed");
    assert_eq!(missing_files(&LocalDirectory(output.clone())), ["sub/x.json"]);
}

#[test]
fn what_is_not_committed_leaves_nothing() {
    let root = tempfile::tempdir().expect("a directory");
    drop(begin(&root.path().join("a/b"), "new", &NAMES));
    assert!(!root.path().join("a").exists());
    let output = root.path().join("out");
    model(&output, "old", &NAMES);
    let before = snapshot(root.path());
    drop(begin(&output, "new", &NAMES));
    assert_eq!(snapshot(root.path()), before);
}

#[test]
fn a_new_model_replaces_the_older_one_and_nothing_else() {
    let root = tempfile::tempdir().expect("a directory");
    let output = root.path();
    let carried = [&NAMES[..], &["tokenizer.json", "1_Pooling/config.json", "tool.py"]].concat();
    model(output, "old", &carried);
    for bystander in ["notes.txt", "style.safetensors", "deep/config.json"] {
        let path = output.join(bystander);
        fs::create_dir_all(path.parent().expect("a parent")).expect("made");
        fs::write(path, "mine").expect("written");
    }
    // What the manifest does not list, but only a model has.
    fs::write(output.join("chat_template.jinja"), "old").expect("written");
    fs::write(output.join("merge_report.md"), "old").expect("written");
    let staging = begin(output, "new", &["model.safetensors", "config.json"]);
    let Committed { warnings, lock, .. } = staging.commit().expect("committed");
    let [warning] = &warnings[..] else { panic!("one warning") };
    assert!(warning.contains("style.safetensors: stays there with weights"), "{warning}");
    let again = Staging::create(output, request(true, &NAMES)).expect_err("still locked");
    assert!(again.to_string().contains("another merge is writing there"), "{again}");
    assert_eq!(lock.release(), None);
    let mut files = names(output);
    files.sort();
    assert_eq!(
        files,
        [
            "config.json",
            "deep/config.json",
            MANIFEST,
            "model.safetensors",
            "notes.txt",
            "style.safetensors"
        ]
    );
}

#[test]
fn what_the_staging_directory_lost_is_never_published() {
    let root = tempfile::tempdir().expect("a directory");
    let output = root.path();
    model(output, "old", &NAMES);
    let before = snapshot(output);
    type Spoil = (&'static str, fn(&Path));
    let spoil: [Spoil; 5] = [
        ("removed", |model| fs::remove_file(model.join(NAMES[0])).expect("removed")),
        ("removed", |model| fs::remove_dir_all(model).expect("removed")),
        ("changed", |model| {
            fs::remove_file(model.join("config.json")).expect("removed");
            fs::write(model.join("config.json"), "new").expect("written");
        }),
        ("changed", |model| fs::write(model.join("config.json"), "longer").expect("written")),
        ("removed", |model| {
            fs::remove_dir_all(model.parent().expect("a parent")).expect("removed");
        }),
    ];
    for (how, spoil) in spoil {
        let staging = begin(output, "new", &NAMES);
        spoil(&staging.directory.join(&staging.model));
        let error = staging.commit().expect_err("it is not whole").to_string();
        assert!(error.contains(how) && error.contains("start it again"), "{error}");
        assert_eq!(snapshot(output), before, "{how}");
    }
}

#[test]
fn two_merges_into_one_place_do_not_meet() {
    let root = tempfile::tempdir().expect("a directory");
    let output = root.path().join("out");
    let first = begin(&output, "first", &NAMES);
    let second = Staging::create(&output, request(true, &NAMES)).expect_err("the second");
    assert!(second.to_string().contains("another merge is writing there"));
    // Somebody deletes the lock, and a second merge takes the place.
    fs::remove_dir_all(output.join(DIRECTORY)).expect("removed");
    let second = begin(&output, "second", &NAMES);
    let error = first.commit().expect_err("lost its place").to_string();
    assert!(error.contains("something removed"), "{error}");
    second.commit().expect("committed");
    assert!(snapshot(&output).iter().all(|(_, content)| !content.contains("first")));
    drop(begin(&root.path().join("other"), "first", &NAMES));
    assert!(!root.path().join("other").exists());
}

#[test]
fn what_comes_into_the_output_meanwhile_is_not_replaced() {
    let root = tempfile::tempdir().expect("a directory");
    let output = root.path().join("out");
    let staging = begin(&output, "new", &NAMES);
    fs::write(output.join("config.json"), "somebody's").expect("written");
    let error = staging.commit().expect_err("not ours").to_string();
    assert!(error.contains("config.json has come into it while"), "{error}");
    assert!(error.contains("the finished model lies in"), "{error}");
    assert_eq!(fs::read_to_string(output.join("config.json")).expect("there"), "somebody's");
    let kept = error.split("lies in ").nth(1).and_then(|rest| rest.split(" until").next());
    let kept = Path::new(kept.expect("says where"));
    assert_eq!(fs::read_to_string(kept.join(NAMES[1])).expect("kept"), "new");
    // Neither a merge that is refused nor one that fails nor a recovery takes it away.
    Staging::create(&output, request(false, &NAMES)).expect_err("not empty");
    drop(begin(&output, "newer", &NAMES));
    assert_eq!(recover(&output).expect("recovered"), Recovery::Kept);
    assert_eq!(fs::read_to_string(kept.join(NAMES[1])).expect("kept"), "new");
    model(&output, "newest", &NAMES);
    assert!(!output.join(DIRECTORY).exists());
}

#[test]
fn a_finished_model_is_never_taken_back() {
    let root = tempfile::tempdir().expect("a directory");
    let output = root.path().join("out");
    let mut staging = begin(&output, "new", &NAMES);
    staging.kept = true;
    assert!(commit::cut_off(&mut staging, 100), "all is in its place but the journal");
    drop(staging);
    check_whole(&output).expect("whole");
    let error = Staging::create(&output, request(false, &NAMES)).expect_err("not empty");
    assert!(error.to_string().contains("has just been finished; it exists and is not empty"));
    assert_eq!(fs::read_to_string(output.join(NAMES[1])).expect("there"), "new");
    assert!(!output.join(DIRECTORY).exists());
}

#[test]
fn what_somebody_saved_after_a_crash_is_not_the_merges() {
    let root = tempfile::tempdir().expect("a directory");
    let output = root.path().join("out");
    model(&output, "old", &NAMES);
    let older = names(&output).len();
    let mut staging = begin(&output, "new", &NAMES);
    staging.kept = true;
    // The journal, all of the older model, and one of the new files.
    assert!(!commit::cut_off(&mut staging, 1 + older + 1));
    drop(staging);
    let saved = output.join(NAMES[0]);
    std::thread::sleep(std::time::Duration::from_millis(20));
    fs::remove_file(&saved).expect("placed");
    fs::write(&saved, "somebody's").expect("written");
    let error = recover(&output).expect_err("not ours").to_string();
    assert!(error.contains("is not its file; move it away"), "{error}");
    assert_eq!(fs::read_to_string(&saved).expect("there"), "somebody's");
    fs::remove_file(&saved).expect("moved away");
    recover(&output).expect("recovered");
}

#[cfg(unix)]
#[test]
fn what_lies_behind_a_linked_folder_is_not_the_models() {
    let root = tempfile::tempdir().expect("a directory");
    let (output, other) = (root.path().join("out"), root.path().join("other"));
    model(&output, "old", &["model.safetensors", "sub/x.json", "config.json"]);
    fs::create_dir(&other).expect("made");
    fs::write(other.join("x.json"), "mine").expect("written");
    fs::remove_dir_all(output.join("sub")).expect("removed");
    std::os::unix::fs::symlink(&other, output.join("sub")).expect("linked");
    model(&output, "new", &["model.safetensors", "config.json"]);
    assert_eq!(fs::read_to_string(other.join("x.json")).expect("there"), "mine");
    assert!(!stays_inside(&output, "sub/x.json") && stays_inside(&output, "new/x.json"));
    assert!(!stays_inside(&output, ".lorafast-partial/lock") && !stays_inside(&output, "../x"));
    assert!(!stays_inside(&output, "/x") && !stays_inside(&output, ""));
}

#[test]
fn places_are_tried_before_anything_moves() {
    let root = tempfile::tempdir().expect("a directory");
    let output = root.path();
    let refused = |names: &[&str]| {
        let before = snapshot(output);
        let error = Staging::create(output, request(true, names)).expect_err("refused");
        assert_eq!(snapshot(output), before);
        assert!(!output.join(DIRECTORY).exists());
        error.to_string()
    };
    fs::create_dir_all(output.join("config.json/x")).expect("made");
    assert!(refused(&NAMES).contains("config.json: is a directory where the model has a file"));
    fs::remove_dir_all(output.join("config.json")).expect("removed");
    fs::write(output.join("sub"), "mine").expect("written");
    assert!(refused(&["sub/x.json"]).contains("sub: is no directory"));
    fs::write(output.join("adapter_config.json"), "{}").expect("written");
    assert!(refused(&NAMES).contains("holds an adapter (adapter_config.json)"));
}

/// Cuts a commit off after every number of its steps, and recovers in every way.
#[test]
fn a_commit_that_was_cut_off_is_finished_or_taken_back() {
    for was_there in [false, true] {
        let mut steps = 0;
        loop {
            let root = tempfile::tempdir().expect("a directory");
            let output = root.path().join("out");
            let older = [&NAMES[..], &["tokenizer.json"]].concat();
            if was_there {
                model(&output, "old", &older);
            } else {
                fs::create_dir(&output).expect("made");
            }
            fs::write(output.join("notes.txt"), "mine").expect("written");
            let before = snapshot(&output);
            let mut staging = begin(&output, "new", &NAMES);
            staging.kept = true;
            let content = manifest::encode([("config.json", 3)].into_iter());
            staging.put(MANIFEST, &content, None).expect("written");
            let is_done = commit::cut_off(&mut staging, steps);
            drop(staging);
            let refusal = check_whole(&output);
            assert_eq!(refusal.is_ok(), is_done || steps == 0, "{steps}: {refusal:?}");
            if steps > 0 && !is_done {
                assert!(refusal.expect_err("refused").to_string().contains("lorafast recover"));
            }
            let finished = recover(&output).expect("recovered");
            match steps {
                0 => assert_eq!(finished, Recovery::Cleared),
                _ => assert_eq!(finished, Recovery::Finished),
            }
            let after = snapshot(&output);
            if steps == 0 {
                assert_eq!(after, before);
            } else {
                assert!(after.iter().any(|(name, _)| name == "notes.txt"));
                assert!(after.iter().all(|(_, content)| !content.contains("old")), "{steps}");
                assert_eq!(after.len(), NAMES.len() + 2, "{after:?}");
            }
            assert!(!output.join(DIRECTORY).exists());
            assert_eq!(recover(&output).expect("nothing left"), Recovery::Nothing);

            // The same, but a part of the new model is lost: the older one comes back.
            if steps > 0 && !is_done {
                let root = tempfile::tempdir().expect("a directory");
                let output = root.path().join("out");
                if was_there {
                    model(&output, "old", &older);
                } else {
                    fs::create_dir(&output).expect("made");
                }
                let before = snapshot(&output);
                let mut staging = begin(&output, "new", &NAMES);
                staging.kept = true;
                staging.put(MANIFEST, &content, None).expect("written");
                commit::cut_off(&mut staging, steps);
                let last = staging.directory.join(&staging.model).join("config.json");
                drop(staging);
                fs::remove_file(last).expect("there");
                assert_eq!(recover(&output).expect("recovered"), Recovery::TakenBack);
                assert_eq!(snapshot(&output), before, "{steps}");
            }
            if is_done {
                break;
            }
            steps += 1;
        }
        assert!(steps > 5);
    }
}

/// The same of pipelines, whose files lie in folders.
#[test]
fn a_pipeline_whose_commit_was_cut_off_is_finished_or_taken_back() {
    let list = r#"{"unet": ["diffusers", "A"], "vae": ["diffusers", "B"]}"#;
    let names =
        ["unet/config.json", "unet/diffusion_pytorch_model.safetensors", "model_index.json"];
    let stale = ["unet/diffusion_pytorch_model.fp16.safetensors", "vae/config.json"];
    for lose in [false, true] {
        let mut steps = 1;
        loop {
            let root = tempfile::tempdir().expect("a directory");
            let output = root.path().join("out");
            // As somebody else wrote it: nothing but the list tells of what it consists.
            for name in names.iter().chain(&stale).chain(&["unet/notes.txt"]) {
                let path = output.join(name);
                fs::create_dir_all(path.parent().expect("a folder")).expect("made");
                let content = if *name == "model_index.json" { list } else { "old" };
                fs::write(path, content).expect("written");
            }
            let before = snapshot(&output);
            let mut staging = begin(&output, "new", &names);
            staging.kept = true;
            let content = manifest::encode([("unet/config.json", 3)].into_iter());
            staging.put(MANIFEST, &content, None).expect("written");
            let is_done = commit::cut_off(&mut staging, steps);
            let made = staging.directory.join(&staging.model).join("model_index.json");
            drop(staging);
            if is_done {
                break;
            }
            assert!(check_whole(&output).is_err(), "{steps}");
            if lose {
                fs::remove_file(made).expect("it comes last");
                assert_eq!(recover(&output).expect("recovered"), Recovery::TakenBack);
                assert_eq!(snapshot(&output), before, "{steps}");
            } else {
                assert_eq!(recover(&output).expect("recovered"), Recovery::Finished);
                let found = self::names(&output);
                let expected = [MANIFEST, names[2], names[0], names[1], "unet/notes.txt"];
                assert_eq!(found, expected, "{steps}");
                assert!(!output.join("vae").exists(), "an empty folder is left");
            }
            steps += 1;
        }
        assert!(steps > 5);
    }
}

#[test]
fn a_merge_into_a_place_that_was_cut_off_begins_with_a_whole_output() {
    let root = tempfile::tempdir().expect("a directory");
    for was_there in [false, true] {
        let output = root.path().join(format!("{was_there}"));
        if was_there {
            model(&output, "old", &NAMES);
        }
        let mut staging = begin(&output, "new", &NAMES);
        staging.kept = true;
        commit::cut_off(&mut staging, 3);
        drop(staging);
        // As it was called the first time: without `overwrite` where nothing had been.
        let again = Staging::create(&output, request(was_there, &NAMES)).expect("a place");
        drop(again);
        if was_there {
            assert!(snapshot(&output).iter().all(|(_, content)| !content.contains("old")));
        } else {
            assert!(!output.join("config.json").exists());
        }
    }
}

#[cfg(unix)]
#[test]
fn nothing_is_followed_or_emptied_through_a_link() {
    use std::os::unix::fs::symlink;
    let root = tempfile::tempdir().expect("a directory");
    let (output, other) = (root.path().join("out"), root.path().join("other"));
    fs::create_dir_all(&other).expect("made");
    fs::create_dir_all(&output).expect("made");
    fs::write(other.join("precious"), "mine").expect("written");
    symlink(&other, output.join(DIRECTORY)).expect("linked");
    let error = Staging::create(&output, request(true, &NAMES)).expect_err("refused").to_string();
    assert!(error.contains("is a link where merges are prepared"), "{error}");
    fs::remove_file(output.join(DIRECTORY)).expect("removed");
    fs::create_dir(output.join(DIRECTORY)).expect("made");
    symlink(other.join("precious"), output.join(DIRECTORY).join("lock")).expect("linked");
    Staging::create(&output, request(true, &NAMES)).expect_err("refused");
    assert_eq!(fs::read_to_string(other.join("precious")).expect("there"), "mine");
    // A link under the name of a file is replaced, and not what it leads to.
    fs::remove_dir_all(output.join(DIRECTORY)).expect("removed");
    symlink(other.join("precious"), output.join("config.json")).expect("linked");
    model(&output, "new", &NAMES);
    assert_eq!(fs::read_to_string(other.join("precious")).expect("there"), "mine");
    assert!(!output.join("config.json").is_symlink());
}

#[cfg(unix)]
#[test]
fn what_is_read_is_never_moved_away_under_whatever_name() {
    use std::os::unix::fs::symlink;
    let root = tempfile::tempdir().expect("a directory");
    let (base, output) = (root.path().join("base"), root.path().join("out"));
    model(&output, "weights", &["model.safetensors", "config.json"]);
    fs::create_dir(&base).expect("made");
    symlink(output.join("model.safetensors"), base.join("model.safetensors")).expect("linked");
    let before = snapshot(root.path());
    let input = |path: PathBuf, is_base| Input { path, what: "the base".to_owned(), is_base };
    let refused = |inputs: Vec<Input>, output: &Path| {
        let request = Request { inputs, ..request(true, &["model.safetensors"]) };
        let error = Staging::create(output, request).expect_err("refused").to_string();
        assert_eq!(snapshot(root.path()), before);
        error
    };
    let shard = input(base.join("model.safetensors"), false);
    let error = refused(vec![shard], &output);
    assert!(error.contains("its model.safetensors is a file of the base"), "{error}");
    let error = refused(vec![input(output.clone(), true)], &output.join("below"));
    assert!(error.contains("lies inside the base"), "{error}");
    let error = refused(vec![input(base.clone(), true)], &base);
    assert!(error.contains("is the base itself"), "{error}");
}

/// A model that has the first shard of the older one, and whose other files hold `text`.
fn begin_with_kept(output: &Path, text: &str) -> Box<Staging> {
    let mut staging = Box::new(Staging::create(output, request(true, &NAMES)).expect("a place"));
    let mark = FileMark::of(&fs::metadata(output.join(NAMES[0])).expect("the older model's"));
    assert!(staging.keep(&[(NAMES[0], mark)]).expect("looked at"));
    for name in &NAMES[1..] {
        staging.put(name, text.as_bytes(), None).expect("written");
    }
    staging
}

#[test]
fn a_file_that_both_models_have_stays_the_same_file() {
    let root = tempfile::tempdir().expect("a directory");
    let output = root.path().join("out");
    model(&output, "old", &NAMES);
    let mark = || FileMark::of(&fs::metadata(output.join(NAMES[0])).expect("there"));
    let before = mark();
    begin_with_kept(&output, "new").commit().expect("committed");
    assert_eq!(mark(), before);
    let mut expected: Vec<_> =
        NAMES.iter().chain([&MANIFEST]).map(|&name| name.to_owned()).collect();
    expected.sort();
    assert_eq!(names(&output), expected);
    assert!(missing_files(&LocalDirectory(output.clone())).is_empty());
    let listed = manifest::listed(&output).into_iter().map(|(name, _)| name);
    let expected: BTreeSet<_> = expected.into_iter().filter(|name| name != MANIFEST).collect();
    assert_eq!(listed.collect::<BTreeSet<_>>(), expected);
    // Dropped, it leaves what it was to keep.
    let before = snapshot(&output);
    drop(begin_with_kept(&output, "third"));
    assert_eq!(snapshot(&output), before);
}

#[test]
fn a_file_that_changed_is_not_kept() {
    let root = tempfile::tempdir().expect("a directory");
    let output = root.path().join("out");
    model(&output, "old", &NAMES);
    let mark = FileMark::of(&fs::metadata(output.join(NAMES[0])).expect("there"));
    let mut staging = Box::new(Staging::create(&output, request(true, &NAMES)).expect("a place"));
    let others = [
        FileMark { bytes: mark.bytes + 1, ..mark },
        FileMark { inode: mark.inode + 1, ..mark },
        FileMark { modified: mark.modified + 1, ..mark },
        FileMark { changed: mark.changed + 1, ..mark },
    ];
    for other in others {
        assert!(!staging.keep(&[(NAMES[0], other)]).expect("looked at"));
    }
    // All of some files or none.
    let absent = (NAMES[1], FileMark { inode: 0, ..mark });
    assert!(!staging.keep(&[(NAMES[0], mark), absent]).expect("looked at"));
    drop(staging);
    let staging = begin_with_kept(&output, "new");
    fs::write(output.join(NAMES[0]), "odd").expect("written to meanwhile");
    let before = fs::read_to_string(output.join("config.json")).expect("there");
    let error = staging.commit().expect_err("refused").to_string();
    assert!(error.contains("something changed"), "{error}");
    assert_eq!(fs::read_to_string(output.join("config.json")).expect("there"), before);
}

#[test]
fn a_commit_with_kept_files_that_was_cut_off_is_finished_or_taken_back() {
    for steps in 0..100 {
        let root = tempfile::tempdir().expect("a directory");
        let output = root.path().join("out");
        model(&output, "old", &NAMES);
        let kept = FileMark::of(&fs::metadata(output.join(NAMES[0])).expect("there"));
        let older = snapshot(&output);
        let mut staging = begin_with_kept(&output, "new");
        let content = manifest::encode([(NAMES[0], kept.bytes)].into_iter());
        staging.put(MANIFEST, &content, None).expect("written");
        let is_done = commit::cut_off(&mut staging, steps);
        // As a killed process leaves it.
        staging.kept = true;
        drop(staging);
        let recovery = recover(&output).expect("recovered");
        assert_eq!(FileMark::of(&fs::metadata(output.join(NAMES[0])).expect("there")), kept);
        let found = snapshot(&output);
        if recovery == Recovery::Finished {
            let text = |name: &str| fs::read_to_string(output.join(name)).expect("there");
            assert!(NAMES[1..].iter().all(|name| text(name) == "new"), "{found:?}");
            assert_eq!(text(NAMES[0]), "old");
        } else {
            assert_eq!(found, older);
        }
        assert!(!output.join(DIRECTORY).exists());
        if is_done {
            return;
        }
    }
    panic!("a commit has an end");
}
