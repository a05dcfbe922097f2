// A prompt becomes a picture: draw BUNDLE PROMPT SEED OUTPUT.ppm
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <tgate.hpp>

int main(int count, char** words) {
  if (count != 5) {
    std::cerr << "usage: draw BUNDLE PROMPT SEED OUTPUT.ppm\n";
    return 2;
  }
  try {
    const tgate::Bundle bundle(words[1]);
    const tgate::Session session(bundle);
    tgate::RequestOptions ask;
    ask.prompt = words[2];
    ask.seed = std::strtoull(words[3], nullptr, 10);
    ask.on_step = [](const tgate_progress& progress) {
      std::cerr << '\r' << progress.done << " of " << progress.total << std::flush;
      return true;  // false stops it
    };
    tgate::Request request(session, ask);
    request.run();
    const tgate::Picture picture = request.decode();
    std::ofstream file(words[4], std::ios::binary);
    file << "P6 " << picture.width << ' ' << picture.height << " 255\n";
    file.write(reinterpret_cast<const char*>(picture.pixels.data()), static_cast<std::streamsize>(picture.pixels.size()));
    std::cerr << '\n';
    return file ? 0 : 1;
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
}
