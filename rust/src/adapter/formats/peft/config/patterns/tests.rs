use std::time::Instant;

use proptest::prelude::*;

use super::*;

fn patterns(keys: &[&str]) -> Patterns {
    let keys = keys.iter().map(|key| (*key).to_owned()).collect();
    Patterns::new(keys, Budget::default()).expect("sound")
}

/// One after the other, as PEFT does it.
fn by_brute_force(keys: &[String], path: &str) -> Option<usize> {
    keys.iter().position(|key| {
        let regex = Regex::new(&format!(r"^(.*\.)?({key})\n?\z")).expect("sound");
        regex.is_match(path).expect("few steps")
    })
}

/// Keys of all three kinds over a few characters, so that many match.
fn key() -> impl Strategy<Value = String> {
    let atom = prop_oneof![
        8 => "[ab1_.]",
        1 => Just("ü".to_owned()),
        2 => Just(r"\.".to_owned()),
        1 => Just(r"\-".to_owned()),
        1 => prop::sample::select(vec![r"\d", r"\w", r"\D", r"\W", r"\s", "[ab]", "[^a.]", "[a-c1]",
            r"[\d_]", "[.]"]).prop_map(str::to_owned),
    ];
    let leaf = prop::collection::vec(atom, 1..5).prop_map(|atoms| atoms.concat());
    let tree = leaf.prop_recursive(3, 12, 3, |inner| {
        let counts = vec!["*", "+", "?", "*?", "+?", "{2}", "{1,2}", "{0,}", "{2,3}?"];
        prop_oneof![
            (inner.clone(), prop::sample::select(counts))
                .prop_map(|(inner, count)| format!("({inner}){count}")),
            (inner.clone(), inner.clone()).prop_map(|(left, right)| format!("(?:{left}|{right})")),
            (inner.clone(), inner.clone()).prop_map(|(left, right)| format!("{left}|{right}")),
            (inner.clone(), inner.clone()).prop_map(|(left, right)| format!("{left}.*{right}")),
            (inner.clone(), inner.clone()).prop_map(|(left, right)| format!("{left}(?!{right}).")),
            inner.clone().prop_map(|inner| format!("^{inner}")),
        ]
    });
    prop_oneof![3 => "[ab1_.]{1,6}", 2 => tree]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_500))]

    #[test]
    fn a_set_finds_what_its_patterns_find_one_by_one(
        keys in prop::collection::vec(key(), 1..6),
        paths in prop::collection::vec("[ab1_.]{0,9}(\n|ü|-|b)?[ab.]{0,2}\n?", 1..12),
    ) {
        let set = Patterns::new(keys.clone(), Budget::default()).expect("sound");
        for path in paths {
            let expected = by_brute_force(&keys, &path);
            prop_assert_eq!(set.first_match(&path), Ok(expected), "{:?} on {:?}", keys, path);
            prop_assert_eq!(set.first_match(&path), Ok(expected), "asked again");
        }
    }
}

#[test]
fn a_key_goes_the_cheapest_way_that_gives_the_same_answer() {
    let set = patterns(&[
        "q_proj",
        r"model\.layers\.0\.q",
        "^model.layers.0.k$",
        r"layers\.(0|1)\.up",
        r"\d+",
        r".*\.(?!1\.)\d+\.up",
        r"(a)\3",
        "ü(x|y)",
        "[[:alpha:]]",
        "a++",
    ]);
    let automaton: Vec<_> = set.regular.iter().map(|(position, _)| *position).collect();
    let others: Vec<_> = set.others.iter().map(|(position, _)| *position).collect();
    assert_eq!(automaton, [3, 4]);
    assert_eq!(others, [5, 6, 7, 8, 9]);
}

#[test]
fn the_end_of_a_line_is_read_as_python_reads_it() {
    let set = patterns(&["a.c", "b$", "x(?=y)y$"]);
    assert_eq!(set.first_match("m.a.c\n"), Ok(Some(0)));
    assert_eq!(set.first_match("m.a\nc"), Ok(None));
    assert_eq!(set.first_match("m\n.a.c"), Ok(None));
    assert_eq!(set.first_match("m.b\n"), Ok(Some(1)));
    assert_eq!(set.first_match("m.b\n\n"), Ok(None));
    assert_eq!(set.first_match("m.xy\n"), Ok(Some(2)));
}

#[test]
fn a_pattern_that_takes_too_many_steps_is_an_error_and_no_mismatch() {
    let set = patterns(&["q", "((?=a)a+)+b"]);
    assert_eq!(set.first_match("m.q"), Ok(Some(0)));
    assert_eq!(set.first_match(&("a".repeat(200) + "cb")), Err(Fault::Exceeded(1)));
    // Many that are cheap come to the same.
    let keys: Vec<_> = (0..100).map(|one| format!("(?=a)x{one}")).collect();
    let set = Patterns::new(keys, Budget::default()).expect("sound");
    let found = (0..10_000).map(|one| set.first_match(&format!("b.c.d{one}")));
    let faults: Vec<_> = found.filter_map(Result::err).take(1).collect();
    assert!(matches!(faults[..], [Fault::Exceeded(_)]), "{faults:?}");
    // What an automaton can decide takes few steps, however it is written.
    assert_eq!(patterns(&["(a+)+b"]).first_match(&"a".repeat(2_000)), Ok(None));
}

#[test]
fn keys_too_large_to_compile_are_errors() {
    let compile = |key: &str| Patterns::new(vec![key.to_owned()], Budget::default()).err();
    assert_eq!(compile("(a{1000}){1000}"), Some(Fault::Exceeded(0)));
    assert!(matches!(compile(r"(?=x)\w{1000000}"), Some(Fault::Invalid(0, _))));
    assert!(matches!(compile("("), Some(Fault::Invalid(0, _))));
    assert!(matches!(compile(&"(".repeat(100_000)), Some(Fault::Invalid(0, _))));
    let keys = vec![r"(a|b|c|d){500}".to_owned(); 10_000];
    assert!(matches!(Patterns::new(keys, Budget::default()), Err(Fault::Exceeded(_))));
    let keys = vec![r"(?=a)\w\w\w".to_owned(); 100_000];
    assert!(matches!(Patterns::new(keys, Budget::default()), Err(Fault::Exceeded(_))));
}

#[test]
fn thousands_of_patterns_over_thousands_of_modules_take_part_of_a_second() {
    let module = |layer: usize, kind: usize| format!("model.layers.{layer}.self_attn.proj{kind}");
    let kinds: [fn(&str) -> String; 3] = [
        |name| name.to_owned(),
        |name| fancy_regex::escape(name).into_owned(),
        |name| name.replace("layers.", r"layers\.0*"),
    ];
    for kind in kinds {
        let keys: Vec<_> = (0..5_000).map(|one| kind(&module(one / 10, one % 10))).collect();
        let begin = Instant::now();
        let set = Patterns::new(keys, Budget::default()).expect("sound");
        for one in 0..5_000 {
            assert_eq!(set.first_match(&module(one / 10, one % 10)), Ok(Some(one)));
            assert_eq!(set.first_match(&module(one / 10, 10 + one % 10)), Ok(None));
        }
        let seconds = begin.elapsed().as_secs_f64();
        println!("{seconds:.3} s, {:?} steps left", set.budget);
        // Far more than it takes, for machines that do something else as well.
        assert!(seconds < 5.0, "{seconds}");
    }
}
