//! Sizes as virtualization people write them: `4k` is 4096, `1GiB` and `1G` are the same.

/// Suffix letters and how often they multiply by 1024.
const LETTERS: [(char, u32); 6] = [('k', 1), ('m', 2), ('g', 3), ('t', 4), ('p', 5), ('e', 6)];

/// Parses `512`, `4k`, `1GiB`, `1.5T`; binary whatever the suffix's form. The result is a whole number of bytes.
pub fn parse(text: &str) -> Result<u64, String> {
    parse_bytes(text).ok_or_else(|| {
        format!("\"{text}\" is not a size; write bytes, or a number with k, M, G or T (1024 each), as in 64MiB or 1.5T")
    })
}

fn parse_bytes(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits_len = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits_len);
    let suffix = suffix.trim_start().to_ascii_lowercase();
    let power = match suffix.chars().next() {
        None => 0,
        Some('b') if suffix == "b" => 0,
        Some(letter) => {
            let (_, power) = LETTERS.into_iter().find(|(known, _)| *known == letter)?;
            matches!(&suffix[1..], "" | "b" | "ib").then_some(power)?
        }
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    if whole.is_empty() || fraction.is_empty() || fraction.len() > 9 {
        return None;
    }
    // Exact: whole and fraction are scaled together, and what is left over must be nothing.
    let scale = 10_u128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let scaled =
        u128::from(whole.parse::<u64>().ok()?) * scale + u128::from(fraction.parse::<u64>().ok()?);
    let bytes = scaled.checked_mul(1 << (10 * power))?;
    (bytes % scale == 0).then_some(bytes / scale).and_then(|bytes| u64::try_from(bytes).ok())
}

/// A size for people: `512 B`, `4 KiB`, `1.5 GiB`.
pub fn format(bytes: u64) -> String {
    let mut unit = "B";
    let mut divisor = 1_u64;
    for (name, power) in [("KiB", 1), ("MiB", 2), ("GiB", 3), ("TiB", 4), ("PiB", 5)] {
        if bytes >> (10 * power) == 0 {
            break;
        }
        unit = name;
        divisor = 1 << (10 * power);
    }
    let (whole, tenths) = (bytes / divisor, (bytes % divisor).saturating_mul(10) / divisor);
    if tenths == 0 { format!("{whole} {unit}") } else { format!("{whole}.{tenths} {unit}") }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn suffixes_are_binary_in_every_form() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("512B", 512),
            ("4k", 4096),
            ("4K", 4096),
            ("4kb", 4096),
            ("4 KiB", 4096),
            ("64M", 64 << 20),
            ("1GiB", 1 << 30),
            ("1g", 1 << 30),
            ("1.5G", 3 << 29),
            ("0.5k", 512),
            ("2TB", 2 << 40),
            ("16383PiB", 16383 << 50),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        for text in [
            "", "k", "1x", "1kk", "1kib2", "-1", "1.2", "1.", ".5k", "1e3", "16384P", "0x10",
            "1,5G", "1 2",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
        assert_eq!(format(0), "0 B");
        assert_eq!(format(4096), "4 KiB");
        assert_eq!(format(3 << 29), "1.5 GiB");
    }

    proptest! {
        #[test]
        fn any_text_parses_or_fails_in_words(text in "\\PC{0,12}") {
            let _ = parse(&text);
        }
    }
}
