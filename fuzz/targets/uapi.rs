#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| shroud_fuzz::uapi::check(bytes));
