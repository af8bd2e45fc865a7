use super::*;

#[cfg(unix)]
#[test]
fn only_a_plain_file_is_opened_and_only_no_name_is_an_absence() {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path();
    assert!(find(&root.join("x")).expect("looked at").is_none());
    std::os::unix::fs::symlink("nowhere", root.join("link")).expect("made");
    let lost = find(&root.join("link")).expect_err("leads nowhere").to_string();
    assert!(lost.contains("is a link to nowhere, which is not there"), "{lost}");
    let around = root.join("around");
    std::os::unix::fs::symlink("around", &around).expect("made");
    assert!(matches!(find(&around), Err(Error::Io { .. })));
    std::os::unix::net::UnixListener::bind(root.join("socket")).expect("made");
    let refused = open(&root.join("socket")).expect_err("no file").to_string();
    assert!(refused.contains("is a socket; a plain file is needed"), "{refused}");
    assert!(open(root).expect_err("no file").to_string().contains("is a directory"));
    assert_eq!(open(Path::new("/dev/null")).expect_err("none").to_string(), {
        "/dev/null: is a device; a plain file is needed here"
    });
}

#[test]
fn a_range_is_copied_whole_and_nothing_else() {
    let directory = tempfile::tempdir().expect("a directory");
    let content: Vec<u8> = (0..100_000u32).map(|index| (index * 7) as u8).collect();
    std::fs::write(directory.path().join("source"), &content).expect("written");
    let source = File::open(directory.path().join("source")).expect("opened");
    let path = directory.path().join("target");
    let options = || File::options().create(true).truncate(true).write(true).open(&path);
    let target = options().expect("opened");
    target.set_len(60_000).expect("sized");
    copy_range(&source, 1_000..51_000, &target, 5_000, &mut [0; 777]).expect("copied");
    let result = std::fs::read(&path).expect("read");
    assert_eq!(result.len(), 60_000);
    assert!(result[5_000..55_000] == content[1_000..51_000]);
    assert!(result[..5_000].iter().chain(&result[55_000..]).all(|byte| *byte == 0));
    let beyond = copy_range(&source, 90_000..110_000, &target, 0, &mut [0; 777]);
    let Err(CopyError::Read(beyond)) = beyond else { panic!("too short") };
    assert_eq!(beyond.kind(), io::ErrorKind::UnexpectedEof);
}
